"""Trainable tokens: step for step PEFT's, with a tied head and without, at every stage and way of computing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.numerics.methods import FEW, check_ways, labelled, pick, write_run, write_ways
from tests.numerics.plain import NUM_STEPS, PEFT_TASK, load_plain, padded_batches, read_rows, run_loop
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_families import starting_head, write_rows

pytestmark = pytest.mark.long
FAMILIES = {"t5": "seq2seq", "bert": "encoder"}
KINDS = ["gpt2", "llama", "bloom", "t5", "bert"]
TEXTS = ["e", "=", "a"]  # frequent in inputs and targets
PROMPT = {"method": "trainable_tokens", "num_virtual_tokens": 0, "tokens": TEXTS}


def ids_of(base: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer.encode(text, add_special_tokens=False)[0] for text in TEXTS]


def peft_model(base: Path, kind: str):
    from peft import TrainableTokensConfig, get_peft_model

    family = FAMILIES.get(kind, "causal")
    head = starting_head(base, kind) if family == "encoder" else None
    more = ["classifier", "pooler"] if head else None
    settings = TrainableTokensConfig(token_indices=ids_of(base), task_type=PEFT_TASK[family])
    model = get_peft_model(load_plain(base, family, head), settings).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("delta" in name or any(word in name for word in more or []))
    return model


def peft_curve_of(base: Path, kind: str, num_steps: int = NUM_STEPS) -> list[float]:
    model = peft_model(base, kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_of(ids, mask, labels):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    batches = padded_batches(AutoTokenizer.from_pretrained(base), FAMILIES.get(kind, "causal"))
    return run_loop(trained, loss_of, batches, num_steps=num_steps)


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    rows = {"bert": {"data": labelled(write_rows(root / "rows.jsonl", read_rows()))}}
    specs = [write_run(root, kind, tiny_bases[kind], PROMPT, **rows.get(kind, {})) for kind in KINDS]
    return train_all(specs, root, num_ranks=1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_under_peft(runs, tiny_bases, kind):
    assert curve(runs[kind]) == pytest.approx(peft_curve_of(tiny_bases[kind], kind), rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, tmp_path):
    base = tiny_bases["gpt2"]
    ways = pick("recomputed", "small", "int8-0", "int8-3", "bf16-3")
    for name in ("int8-0", "int8-3"):
        ways[name] = ways[name] | {"model": {"quantization": "int8", "int8_include": ["head", "embeddings"]}}
    specs = {"gpt2": write_ways(tmp_path, base, PROMPT, None, ways)}
    check_ways(tmp_path, {"gpt2": peft_curve_of(base, "gpt2", FEW)}, specs)


def test_what_is_exported_and_answered_is_pefts_and_adapters_are_starts(runs, tiny_bases, tmp_path):
    from peft import PeftModel

    commands = []
    for kind in ("gpt2", "llama", "t5", "bert"):
        commands.append(["export", str(runs[kind]), "--to", "peft", "--out", str(tmp_path / kind)])
    commands.append(["export", str(runs["gpt2"]), "--to", "model", "--out", str(tmp_path / "model")])
    answers = ["--max-new-tokens", "8", "--output", str(tmp_path / "answers.jsonl")]
    commands.append(["generate", str(runs["gpt2"]), "--input", "sample", *answers])
    run_commands(commands)
    ids = torch.tensor([[*ids_of(tiny_bases["gpt2"]), 20, 30]])
    for kind in ("gpt2", "llama", "t5", "bert"):
        family = FAMILIES.get(kind, "causal")
        head = starting_head(tiny_bases[kind], kind) if family == "encoder" else None
        loaded = PeftModel.from_pretrained(load_plain(tiny_bases[kind], family, head), tmp_path / kind).eval()
        wanted = peft_model(tiny_bases[kind], kind)
        tensors = load_prompt(runs[kind] / "prompt")[0]
        with torch.no_grad():
            for name, parameter in wanted.named_parameters():
                if parameter.requires_grad:
                    own = "trainable_tokens" if "delta" in name else f"head.{name.removeprefix('base_model.model.')}"
                    parameter.copy_(tensors[own])
        more = {"decoder_input_ids": torch.tensor([[1, 40]])} if kind == "t5" else {}
        with torch.no_grad():
            found = [model(input_ids=ids, **more).logits for model in (loaded, wanted)]
            if kind == "gpt2":
                whole = load_plain(tmp_path / "model")
                found.append(whole(input_ids=ids).logits)
                tokenizer = AutoTokenizer.from_pretrained(tiny_bases[kind])
                asked = torch.tensor([tokenizer.encode("sample =")])
                new = whole.generate(asked, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, asked.shape[1] :]
                answer = json.loads((tmp_path / "answers.jsonl").read_text())["generated"]
                assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)
    start = PROMPT | {"init": "file", "init_file": str(tmp_path / "gpt2")}
    again = write_run(tmp_path, "again", tiny_bases["gpt2"], start)[0]
    run = train_all([(again, ["train.max_steps=1", "train.learning_rate=1e-12"])], tmp_path, num_ranks=1)["again"]
    rows = [load_prompt(path / "prompt")[0]["trainable_tokens"] for path in (run, runs["gpt2"])]
    torch.testing.assert_close(*rows)


def test_what_it_is_not_for_is_refused_in_one_line(runs, tiny_bases, tmp_path):
    config = str(runs["llama"] / "config.json")
    weights = tiny_bases["llama"] / "model.safetensors"
    cases = {
        "prompt.tokens: 'abc' is 3 tokens of this base's tokenizer, not one": ["prompt.tokens=[abc]"],
        "prompt.tokens: trainable_tokens needs either": ["prompt.token_indices=[4]"],
        "prompt.tokens: token 70 is listed twice": ["prompt.tokens=[e, e]"],
        "prompt.token_indices: the base has no token 272": ["prompt={method: trainable_tokens, token_indices: [272]}"],
        "prompt.placement: trainable_tokens is for placement prefix": ["prompt.placement=infix"],
        "sweep: trainable_tokens trains": ["sweep={train.learning_rate: [0.1, 0.2]}"],
        "holds no trained tokens": [f"prompt.init_file={weights}", "prompt.init=file"],
    }
    for message, overrides in cases.items():
        failed = run_command("train", config, f"output_dir={tmp_path / 'no'}", *overrides)
        assert failed.returncode == 2 and message in failed.stderr.splitlines()[-1], failed.stderr


def test_it_resumes_exactly(tiny_bases, tmp_path):
    more = {"checkpoint": {"every": 10}}
    whole, parts = (write_run(tmp_path, name, tiny_bases["gpt2"], PROMPT, **more)[0] for name in ("whole", "parts"))
    constant = "train.schedule=constant"
    first = (parts, ["train.max_steps=10", constant])
    train_all([(whole, [constant]), first, (parts, [constant, "deepspeed=zero2_fp32"])], tmp_path, num_ranks=1)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
