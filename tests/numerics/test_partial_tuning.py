"""Partial tuning: step for step a plain loop over transformers' own model, at every stage and with every way of
computing, and without a change to the base."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ptune_dist.base.recompute import DEFAULTS
from ptune_dist.prompts.store import load_prompt
from tests.numerics.methods import labelled, write_run
from tests.numerics.plain import load_plain, padded_batches, read_rows, run_loop
from tests.numerics.test_curves import curve, train_all, zero_json
from tests.numerics.test_families import starting_head, write_rows

pytestmark = pytest.mark.long
RATE = 0.002
SECTIONS = {"train": {"learning_rate": RATE}}
# What each method trains, in words that the names of transformers' parameters contain or end with.
WANTED = {
    ("gpt2", "last_layers"): ["transformer.h.1."],
    ("gpt2", "bias_only"): ["bias"],
    ("gpt2", "norms_only"): ["ln_"],
    ("gpt2", "head_only"): ["lm_head"],
    ("llama", "last_layers"): ["layers.1."],
    ("llama", "norms_only"): ["norm"],
    ("llama", "head_only"): ["lm_head"],
    ("qwen2", "bias_only"): ["bias"],
    ("bloom", "bias_only"): ["bias"],
    ("bloom", "last_layers"): ["h.1."],
    ("t5", "last_layers"): ["decoder.block.1."],
    ("t5", "norms_only"): ["layer_norm"],
    ("bart", "head_only"): ["lm_head"],
    ("bart", "bias_only"): ["bias"],
    ("bert", "last_layers"): ["encoder.layer.1.", "classifier", "pooler"],
    ("bert", "bias_only"): ["bias", "classifier", "pooler"],
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


def plain_curve_of(base_dir: Path, kind: str, method: str) -> list[float]:
    model, trained = plain_model(base_dir, kind, method)
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    batches = padded_batches(AutoTokenizer.from_pretrained(base_dir), FAMILIES.get(kind, "causal"))
    return run_loop(
        parameters, lambda ids, mask, labels: model(ids, attention_mask=mask, labels=labels).loss, batches, optimizer
    )


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


METHODS = ["last_layers", "bias_only", "norms_only", "head_only"]


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, tmp_path):
    base = tiny_bases["gpt2"]
    stage3 = {"deepspeed": zero_json(3)}
    cases = {
        "stage2": {"deepspeed": zero_json(2)},
        "stage3": stage3,
        "recomputed": {"deepspeed": zero_json(3) | {"activation_checkpointing": DEFAULTS}},
        "small": stage3 | {"train": SECTIONS["train"] | {"micro_batch_tokens": 60}},
        "int8-0": {"model": {"quantization": "int8"}},
        "int8-3": {"model": {"quantization": "int8"}} | stage3,
        "bf16-0": {"model": {"dtype": "bfloat16"}},
        "bf16-3": {"model": {"dtype": "bfloat16"}} | stage3,
    }
    specs = [
        write_run(tmp_path, f"{method}-{name}", base, prompt_of(method), **SECTIONS | more)
        for name, more in cases.items()
        for method in METHODS
    ]
    runs = train_all(specs, tmp_path, num_ranks=2)
    for method in METHODS:
        wanted = plain_curve_of(base, "gpt2", method)
        found = {name: curve(runs[f"{method}-{name}"]) for name in cases}
        for name in ("stage2", "stage3", "recomputed", "small"):
            assert found[name] == pytest.approx(wanted, rel=1e-5), (method, name)
        assert found["int8-3"] == pytest.approx(found["int8-0"], rel=1e-5), method
        assert found["int8-0"] == pytest.approx(wanted, rel=0.1), method
        assert found["bf16-3"] == pytest.approx(found["bf16-0"], rel=0.02), method
        assert found["bf16-0"] == pytest.approx(wanted, rel=0.05), method
