"""Adaption prompts: step for step PEFT's, at every stage and with every way of computing, beside other methods."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ptune_dist.data.batches import Batch
from ptune_dist.families.causal import PromptedCausal
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.adaption_prompt import AdaptionPrompt
from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.numerics.banks import check_members
from tests.numerics.methods import FEW, check_ways, pick, write_run, write_ways
from tests.numerics.passes import build_base
from tests.numerics.plain import NUM_STEPS, load_plain, padded_batches, run_loop
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_labels import label_batch, words_of

KINDS = ["gpt2", "llama", "mistral", "qwen2"]
LENGTH, LAYERS, WIDTH = 4, 2, 32
PROMPT = {"method": "adaption_prompt", "num_virtual_tokens": 0, "adapter_len": LENGTH, "adapter_layers": LAYERS}


@pytest.fixture(scope="module")
def bases(tiny_bases, tmp_path_factory) -> dict[str, Path]:
    """Those of this method; a Mistral is a Llama with another name here."""
    folder = tmp_path_factory.mktemp("bases") / "mistral"
    shutil.copytree(tiny_bases["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    return tiny_bases | {"mistral": folder}


def start_of() -> dict[str, torch.Tensor]:
    """Gates are not zero, so that the tokens have a gradient from the first step on."""
    draw = torch.Generator().manual_seed(4)
    return {
        "adaption_prompt": torch.randn(LAYERS, LENGTH, WIDTH, generator=draw),
        "adaption_gate": torch.tensor([0.5, -0.4]),
    }


def peft_model(base: Path, tensors: dict[str, torch.Tensor]):
    from peft import AdaptionPromptConfig, get_peft_model
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    TRANSFORMERS_MODEL_CONFIG["qwen2"] = TRANSFORMERS_MODEL_CONFIG["llama"]  # whose layers have the same projections
    settings = AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(load_plain(base), settings).eval()
    trained = [(name, p) for name, p in model.named_parameters() if "adaption_" in name]
    with torch.no_grad():
        for layer in range(LAYERS):
            for name, parameter in trained:
                if f".{layer}." in name:
                    parameter.copy_(tensors[name.rpartition(".")[2]][layer][None])
    return model


def peft_curve_of(base: Path, num_steps: int = NUM_STEPS) -> list[float]:
    model = peft_model(base, start_of())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * LAYERS

    def loss_of(ids, mask, labels):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return run_loop(trained, loss_of, padded_batches(AutoTokenizer.from_pretrained(base)), num_steps=num_steps)


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    return train_all([write_run(root, kind, bases[kind], PROMPT, start_of()) for kind in KINDS], root, num_ranks=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_it_trains_as_under_peft(runs, bases, kind):
    assert curve(runs[kind]) == pytest.approx(peft_curve_of(bases[kind]), rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


@pytest.mark.long
def test_the_curve_depends_on_no_stage_and_no_way_of_computing(bases, tmp_path):
    ways = {"llama": pick("recomputed", "small", "int8-0", "int8-3", "bf16-3"), "gpt2": pick("recomputed")}
    specs = {kind: write_ways(tmp_path / kind, bases[kind], PROMPT, start_of(), own) for kind, own in ways.items()}
    check_ways(tmp_path, {kind: peft_curve_of(bases[kind], FEW) for kind in ways}, specs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.long
def test_a_sweep_of_several_methods_trains_each_member_as_alone(bases, tmp_path, kind):
    sweep = [
        {"prompt.method": "prompt_tuning"},
        {"prompt.method": "adaption_prompt", "prompt.num_virtual_tokens": 0, "prompt.adapter_layers": 2},
        {"prompt.method": "adaption_prompt", "prompt.num_virtual_tokens": 0, "prompt.adapter_len": 3, "seed": 1},
    ]
    check_members(tmp_path, bases[kind], sweep)


@pytest.mark.long
def test_what_is_exported_and_answered_is_pefts_and_adapters_are_starts(runs, bases, tmp_path):
    from peft import PeftModel

    commands = []
    for kind in ("gpt2", "llama"):
        run = str(runs[kind])
        commands.append(["export", run, "--to", "peft", "--out", str(tmp_path / kind)])
        output = ["--max-new-tokens", "8", "--output", str(tmp_path / f"{kind}.jsonl")]
        commands.append(["generate", run, "--input", "sample", *output])
    run_commands(commands)
    for kind in ("gpt2", "llama"):
        model = PeftModel.from_pretrained(load_plain(bases[kind]), tmp_path / kind).eval()
        wanted = peft_model(bases[kind], load_prompt(runs[kind] / "prompt")[0])
        tokenizer = AutoTokenizer.from_pretrained(bases[kind])
        ids = torch.tensor([tokenizer.encode("sample =")])
        first = ids.shape[1]
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, wanted(input_ids=ids).logits)
            for _ in range(8):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        answer = json.loads((tmp_path / f"{kind}.jsonl").read_text())["generated"]
        assert answer == tokenizer.decode(ids[0, first:], skip_special_tokens=True).strip(), kind
    start = PROMPT | {"init": "file", "init_file": str(tmp_path / "gpt2")}
    again = write_run(tmp_path, "again", bases["gpt2"], start)[0]
    run = train_all([(again, ["train.max_steps=1", "train.learning_rate=1e-12"])], tmp_path, num_ranks=1)["again"]
    found, trained = (load_prompt(path / "prompt")[0] for path in (run, runs["gpt2"]))
    assert all(torch.allclose(found[name], trained[name], atol=1e-6) for name in trained)


@pytest.mark.long
def test_what_it_is_not_for_is_refused_in_one_line(runs, bases, tmp_path):
    config = str(runs["llama"] / "config.json")
    free = ["prompt={method: adaption_prompt}"]
    cases = {
        "prompt.method: adaption_prompt is for llama, mistral": [*free, f"model.path={bases['opt']}"],
        "prompt.adapter_layers: 3 is more than the base has, 2": ["prompt.adapter_layers=3"],
        "prompt.placement: adaption_prompt is for placement prefix": ["prompt.placement=infix"],
        "prompt.method: adaption_prompt is for causal bases": [*free, f"model.path={bases['t5']}"],
        "this prompt is (adapter_layers, adapter_len, width) = (2, 5, 32)": ["prompt.adapter_len=5"],
    }
    for message, overrides in cases.items():
        failed = run_command("train", config, f"output_dir={tmp_path / 'no'}", *overrides)
        assert failed.returncode == 2 and message in failed.stderr.splitlines()[-1], failed.stderr
    failed = run_command("export", str(runs["qwen2"]), "--to", "peft", "--out", str(tmp_path / "e"))
    assert failed.returncode == 2 and "for llama, mistral, gpt2 models only, not for qwen2" in failed.stderr


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral_window"])
def test_labels_after_an_input_have_the_losses_of_whole_texts(kind):
    base = build_base(kind)
    start = start_of()
    prompts = [
        AdaptionPrompt(start["adaption_prompt"], start["adaption_gate"]),
        AdaptionPrompt(start["adaption_prompt"][:1, :3] + 1, torch.tensor([0.7])),
    ]
    model = PromptedCausal(base, prompts, CrossEntropy())
    batch = label_batch("prefix")
    assert batch.trees is not None
    for (row, member), losses in zip(batch.readers, model.label_losses(batch), strict=True):
        labels = [np.array(label) for label in words_of(batch.trees[row])]
        nothing = np.zeros(0, np.int32)
        count = len(labels)
        readers = [(number, member) for number in range(count)]
        whole = model.losses(Batch([nothing] * count, [batch.rests[row]] * count, labels, readers, 1))
        np.testing.assert_allclose(losses, whole.numpy(), rtol=1e-5)


@pytest.mark.long
def test_it_resumes_exactly(bases, tmp_path):
    more = {"checkpoint": {"every": 10}}
    whole, parts = (write_run(tmp_path, name, bases["llama"], PROMPT, **more)[0] for name in ("whole", "parts"))
    constant = "train.schedule=constant"
    first = (parts, ["train.max_steps=10", constant])
    train_all([(whole, [constant]), first, (parts, [constant, "deepspeed=zero2_fp32"])], tmp_path, num_ranks=1)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
