"""A head that was trained beside a prompt is trained further with it: two runs are one run cut in halves."""

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from ptune_dist.prompts.head_start import HeadStart, read_head
from ptune_dist.prompts.start import Start
from ptune_dist.prompts.store import load_prompt, save_prompt
from tests.commands import run_command
from tests.conftest import LABELS
from tests.numerics.methods import labelled, write_run
from tests.numerics.plain import read_rows
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_families import write_rows

NUM_ROWS, NUM_STEPS = 8, 4
# Without a state, and with all rows in every step, nothing but the prompt and the head tells the halves apart.
STEADY = {"optimizer": "sgd", "learning_rate": 0.3, "schedule": "constant", "batch_size": NUM_ROWS}


def test_training_goes_on_with_the_head_as_one_run_would(tiny_bases, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", read_rows()[:NUM_ROWS])
    number = {"train": str(rows), "target": "{{ word|length }}"}
    numbers = {"objective": "mse", "learning_rate": 0.03}
    cases = {
        "bert": (labelled(rows), {}, {}),
        "llama": (number, numbers, {}),
        "llama-norms": (number, numbers, {"method": "norms_only", "num_virtual_tokens": 0}),
        "llama-head": (number, numbers, {"method": "head_only", "num_virtual_tokens": 0}),
    }
    specs = []
    for kind, (data, objective, method) in cases.items():
        for name, steps, prompt in (
            ("whole", NUM_STEPS, {}),
            ("half", NUM_STEPS // 2, {}),
            ("further", NUM_STEPS // 2, {"init": "file", "init_file": str(tmp_path / f"{kind}-half")}),
        ):
            train = STEADY | objective | {"max_steps": steps}
            base = tiny_bases[kind.partition("-")[0]]
            specs.append(write_run(tmp_path, f"{kind}-{name}", base, method | prompt, data=data, train=train))
    runs = train_all(specs, tmp_path, num_ranks=1)
    for kind in cases:
        whole = curve(runs[f"{kind}-whole"])
        assert all(abs(after - before) > 1e-3 * before for before, after in itertools.pairwise(whole))
        assert curve(runs[f"{kind}-further"]) == pytest.approx(whole[2:], rel=1e-5)
        assert "the head starts as that of" in (runs[f"{kind}-further"] / "train.log").read_text()
    failed = run_command("export", str(runs["llama-norms-half"]), "--to", "model", "--out", str(tmp_path / "out"))
    assert "--to model: this run was trained with a head that answers numbers" in failed.stderr


def test_a_head_among_the_tensors_of_a_base_starts_anew_with_other_labels(tiny_bases, tmp_path):
    rows = labelled(write_rows(tmp_path / "rows.jsonl", read_rows()[:NUM_ROWS]))
    prompt = {"method": "last_layers", "num_virtual_tokens": 0}
    further = prompt | {"init": "file", "init_file": str(tmp_path / "first")}
    train = STEADY | {"max_steps": 1, "learning_rate": 1e-12}
    cases = {"first": (prompt, LABELS, 0.3), "same": (further, LABELS, 1e-12), "fewer": (further, LABELS[:2], 1e-12)}
    cases["other"] = (further, LABELS[::-1], 1e-12)
    specs = []
    for name, (own, labels, rate) in cases.items():
        target = "{{ label if label != 'long' else 'short' }}"
        data = rows | {"labels": labels, "target": target}
        sections = {"data": data, "train": train | {"learning_rate": rate}}
        specs.append(write_run(tmp_path, name, tiny_bases["bert"], own, **sections))
    runs = train_all(specs, tmp_path, num_ranks=1)
    stored, *found = (load_prompt(runs[name] / "prompt")[0] for name in cases)
    for name, tensors in zip(list(cases)[1:], found, strict=True):
        layers = [key for key in stored if "classifier" not in key]
        assert all(torch.allclose(tensors[key], stored[key], atol=1e-6) for key in layers), name
        head = "base.classifier.weight"
        is_same = tensors[head].shape == stored[head].shape and torch.allclose(tensors[head], stored[head], atol=1e-6)
        assert is_same == (name == "same")
        assert ("starts as that of" if is_same else "starts anew") in (runs[name] / "train.log").read_text()


def test_a_head_answers_the_same_numbers_under_another_scale():
    draw = torch.Generator().manual_seed(0)
    weight, bias, hidden = (torch.randn(shape, generator=draw) for shape in ((1, 8), (1,), (5, 8)))
    start = HeadStart("file", {"value_head.weight": weight, "value_head.bias": bias}, {"mean": 3.0, "std": 2.0})
    found = start.tensors_for(-1.0, 0.5)
    before = (hidden @ weight.T + bias) * 2.0 + 3.0
    after = (hidden @ found["value_head.weight"].T + found["value_head.bias"]) * 0.5 - 1.0
    torch.testing.assert_close(after, before)


def read(folder, labels: list[str] | None) -> dict[str, torch.Tensor]:
    start = Start("file", 0, None, lambda ids: torch.zeros(len(ids), 4), file=str(folder))
    return read_head(start, labels).tensors


def test_a_head_is_for_the_labels_that_it_was_trained_for(tmp_path):
    weight = torch.ones(3, 4)
    ours = {name: weight.clone() for name in ("head.classifier.weight", "virtual_tokens")}
    save_prompt(tmp_path / "ours", ours, {"labels": LABELS})
    assert list(read(tmp_path / "ours", LABELS)) == ["head.classifier.weight"]
    assert read(tmp_path / "ours", LABELS[::-1]) == {}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    names = ("base_model.classifier.weight", "base_model.model.bert.embeddings.trainable_tokens_delta")
    save_file(
        {"prompt_embeddings": weight} | {name: weight.clone() for name in names}, theirs / "adapter_model.safetensors"
    )
    (theirs / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    assert list(read(theirs, LABELS)) == ["head.classifier.weight"]
    (theirs / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    assert list(read(theirs, LABELS)) == ["head.classifier.weight"] and read(theirs, LABELS[::-1]) == {}
