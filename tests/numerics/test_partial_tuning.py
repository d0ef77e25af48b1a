"""Partial tuning: step for step a plain loop over transformers' own model, at every stage and with every way of
computing, and without a change to the base."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.numerics.methods import FEW, check_ways, labelled, pick, write_run, write_ways
from tests.numerics.plain import (
    BATCH,
    NUM_STEPS,
    ROWS,
    encode_row,
    load_plain,
    pad,
    padded_batches,
    read_rows,
    run_loop,
)
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_families import starting_head, write_rows

pytestmark = pytest.mark.long
RATE = 0.002
SECTIONS = {"train": {"learning_rate": RATE, "warmup_steps": 0}}
# What each method trains, in words that the names of transformers' parameters contain or end with.
WANTED = {
    ("gpt2", "last_layers"): ["transformer.h.1."],
    ("gpt2", "bias_only"): ["bias"],
    ("gpt2", "norms_only"): ["ln_"],
    ("gpt2", "head_only"): ["lm_head"],
    ("llama", "norms_only"): ["norm"],
    ("qwen2", "bias_only"): ["bias"],
    ("bloom", "last_layers"): ["h.1."],
    ("t5", "last_layers"): ["decoder.block.1."],
    ("t5", "norms_only"): ["layer_norm"],
    ("t5", "head_only"): ["lm_head"],
    ("bart", "head_only"): ["lm_head"],
    ("bert", "last_layers"): ["encoder.layer.1.", "classifier", "pooler"],
    ("bert", "head_only"): ["classifier", "pooler"],
}
FAMILIES = {"t5": "seq2seq", "bart": "seq2seq", "bert": "encoder"}


def prompt_of(method: str) -> dict:
    options = {"num_layers": 1} if method == "last_layers" else {}
    return {"method": method, "num_virtual_tokens": 0} | options


def plain_model(base_dir: Path, kind: str, method: str) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """transformers' own model with a head that is tied to nothing where it is trained, and what is trained."""
    family = FAMILIES.get(kind, "causal")
    head = starting_head(base_dir, kind) if family == "encoder" else None
    model = load_plain(base_dir, family, head)
    if method == "head_only" and family != "encoder":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    words = WANTED[kind, method]
    trained = {name: p for name, p in model.named_parameters() if any(word in name for word in words)}
    for parameter in trained.values():
        parameter.requires_grad_()
    return model, trained


def plain_curve_of(base_dir: Path, kind: str, method: str, num_steps: int = NUM_STEPS) -> list[float]:
    model, trained = plain_model(base_dir, kind, method)
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    batches = padded_batches(AutoTokenizer.from_pretrained(base_dir), FAMILIES.get(kind, "causal"))

    def loss_of(ids, mask, labels):
        return model(ids, attention_mask=mask, labels=labels).loss

    return run_loop(parameters, loss_of, batches, optimizer, num_steps)


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    rows = labelled(write_rows(root / "rows.jsonl", read_rows()))
    specs = []
    for kind, method in WANTED:
        data = {"data": rows} if kind == "bert" else {}
        specs.append(write_run(root, f"{kind}-{method}", tiny_bases[kind], prompt_of(method), **SECTIONS, **data))
    return train_all(specs, root, num_ranks=1)


@pytest.mark.parametrize(("kind", "method"), WANTED)
def test_it_trains_as_a_plain_loop_does(runs, tiny_bases, kind, method):
    run = runs[f"{kind}-{method}"]
    ours = curve(run)
    assert ours == pytest.approx(plain_curve_of(tiny_bases[kind], kind, method), rel=1e-5)
    assert ours[-1] < ours[0]
    tensors, facts = load_prompt(run / "prompt")
    _, trained = plain_model(tiny_bases[kind], kind, method)
    assert {name.removeprefix("base.") for name in tensors} == set(trained)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values()) and facts["num_virtual_tokens"] == 0
    hashes = json.loads((run / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and not set(hashes["after"]) & set(trained)


def check_some(base: Path, folder: Path, asked: dict[str, dict[str, dict]]) -> None:
    """Some methods, each in some ways, on two ranks in one launch."""
    specs = {m: write_ways(folder / m, base, prompt_of(m), None, ways, **SECTIONS) for m, ways in asked.items()}
    check_ways(folder, {method: plain_curve_of(base, "gpt2", method, FEW) for method in asked}, specs)


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, tmp_path):
    asked = {
        "last_layers": pick("recomputed", "bf16-0", "bf16-3"),
        "bias_only": pick("int8-0", "int8-3"),
        "head_only": pick("small"),
    }
    check_some(tiny_bases["gpt2"], tmp_path, asked)


@pytest.mark.extended
def test_the_curve_of_every_method_depends_on_no_way_of_computing(tiny_bases, tmp_path):
    methods = ("last_layers", "bias_only", "norms_only", "head_only")
    ways = pick("stage3", "recomputed", "small", "int8-0", "int8-3", "bf16-0", "bf16-3")
    check_some(tiny_bases["gpt2"], tmp_path, dict.fromkeys(methods, ways))


def test_it_resumes_exactly_and_at_another_stage_and_starts_from_an_earlier_run(tiny_bases, tmp_path):
    prompt = prompt_of("last_layers")
    more = SECTIONS | {"checkpoint": {"every": 10}}
    names = ("whole", "same", "other")
    whole, same, other = (write_run(tmp_path, name, tiny_bases["gpt2"], prompt, **more)[0] for name in names)
    constant = "train.schedule=constant"
    first = ["train.max_steps=10", constant]
    train_all([(whole, [constant]), (same, first), (other, first)], tmp_path, num_ranks=1)
    start = prompt | {"init": "file", "init_file": f"{tmp_path}/whole"}
    again = write_run(tmp_path, "again", tiny_bases["gpt2"], start)
    slow = (again[0], ["train.max_steps=1", "train.learning_rate=1e-12"])
    train_all([(same, [constant]), (other, [constant, "deepspeed=zero3_fp32"]), slow], tmp_path, num_ranks=1)
    assert curve(tmp_path / "same") == curve(tmp_path / "whole")
    assert curve(tmp_path / "other") == pytest.approx(curve(tmp_path / "whole"), rel=1e-5)
    trained, found = (load_prompt(tmp_path / name / "prompt")[0] for name in ("whole", "again"))
    assert trained.keys() == found.keys()
    assert all(torch.allclose(found[name], trained[name], atol=1e-6) for name in trained)


def test_answers_and_an_exported_model_are_those_of_transformers(runs, tiny_bases, tmp_path):
    commands = []
    names = ["gpt2-last_layers", "gpt2-head_only", "qwen2-bias_only", "t5-head_only", "bart-head_only"]
    for name in names:
        commands.append(["export", str(runs[name]), "--to", "model", "--out", str(tmp_path / name)])
        output = ["--max-new-tokens", "8", "--output", str(tmp_path / f"{name}.jsonl")]
        commands.append(["generate", str(runs[name]), "--input", "sample", *output])
    run = runs[names[0]]
    few = [f"data.validation={ROWS}", f"evaluate.max_examples={BATCH}"]
    commands.append(["evaluate", str(run), *few])
    commands.append(["validate", str(run / "config.json"), f"output_dir={tmp_path / 'new'}", *few])
    run_commands(commands)
    for name in names:
        kind, _, method = name.partition("-")
        exported = load_plain(tmp_path / name, FAMILIES.get(kind, "causal"))
        wanted, trained = plain_model(tiny_bases[kind], kind, method)
        tensors = load_prompt(runs[name] / "prompt")[0]
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(tensors[f"base.{key}"])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = torch.tensor([tokenizer.encode("sample =")])
        begin = exported.config.decoder_start_token_id if kind in FAMILIES else None
        more = {} if begin is None else {"decoder_input_ids": torch.tensor([[begin, 40]])}
        with torch.no_grad():
            ours, plain = (model(ids, **more).logits for model in (exported, wanted))
            new = exported.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        skipped = 1 if kind in FAMILIES else ids.shape[1]
        answer = json.loads((tmp_path / f"{name}.jsonl").read_text())["generated"]
        assert answer == tokenizer.decode(new[0, skipped:], skip_special_tokens=True).strip(), name
        if runs[name] == run:
            coded = [encode_row(tokenizer, row, "causal") for row in read_rows()[:BATCH]]
            labels = pad([[-100] * len(read) + written for read, written in coded], -100)
            mask = pad([[1] * len(read + written) for read, written in coded], 0)
            with torch.no_grad():
                loss = exported(pad([a + b for a, b in coded], 1), attention_mask=mask, labels=labels).loss.item()
            found = json.loads((run / "evaluation.json").read_text())
            assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_what_it_is_not_for_is_refused_in_one_line(runs, tiny_bases, tmp_path):
    run = runs["llama-norms_only"]
    config = str(run / "config.json")
    bias = ["prompt={method: bias_only}"]
    cases = {
        "prompt.method: bias_only trains biases, and llama models have none": bias,
        "prompt.num_layers: 3 is more than the base has, 2": ["prompt={method: last_layers, num_layers: 3}"],
        "prompt.placement: norms_only is for placement prefix": ["prompt.placement=infix"],
        "train.context_cache_gib is given but placement prefix has no contexts": ["train.context_cache_gib=1"],
        "sweep: norms_only trains tensors of the base": ["sweep={train.learning_rate: [0.1, 0.2]}"],
        "prompt.num_virtual_tokens: norms_only has no virtual tokens": ["prompt.num_virtual_tokens=4"],
        "prompt.num_virtual_tokens: prompt_tuning needs at": ["prompt={method: prompt_tuning, num_virtual_tokens: 0}"],
        "prompt.init: vocab is not for norms_only, which starts from base": ["prompt.init=vocab"],
        "prompt.num_layers is for last_layers, this is norms_only": ["prompt.num_layers=1"],
        "needs an input before the target": ["data.train=some.txt", "data.template=null", "data.target=null"],
    }
    for message, overrides in cases.items():
        failed = run_command("validate", config, f"output_dir={tmp_path / 'no'}", *overrides)
        assert failed.returncode == 2 and message in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
    other = f"prompt={{method: head_only, init: file, init_file: {run}}}"
    failed = run_command("train", config, f"output_dir={tmp_path / 'no'}", other)
    assert failed.returncode == 2, failed.stderr
    assert "is trained in this run and not there: give the prompt the method and options" in failed.stderr
    exports = {
        "peft": (tmp_path, "PEFT has no norms_only"),
        "prompt-embeds": (tmp_path, "this run trained tensors of the base"),
        "model": (tiny_bases["llama"], "holds another model or other files"),
    }
    for to, (out, message) in exports.items():
        failed = run_command("export", str(run), "--to", to, "--out", str(out))
        assert failed.returncode == 2 and message in failed.stderr.splitlines()[-1], failed.stderr
