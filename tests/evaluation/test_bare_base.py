"""The base without a prompt, which stands beside the gain of a run."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands import run_command
from tests.conftest import TINY, build_tiny_base, write_config
from tests.processes import ROOT


def test_the_base_alone_is_evaluated_as_transformers_would(tmp_path):
    rows = [{"word": "cat", "answer": "CAT"}, {"word": "house", "answer": "HOUSE"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        tmp_path / "config.json",
        data={"train": str(file), "validation": str(file), "template": "{{ word }} =", "target": " {{ answer }}"},
        train={"max_steps": 1, "batch_size": 2},
        evaluate={"metrics": ["loss"], "num_samples": 0},
    )
    done = run_command("train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    model_path = json.loads(config.read_text())["model"]["path"]
    path = model_path if model_path.startswith("/") else ROOT / model_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    loss, count = 0.0, 0
    for row in rows:
        inputs = tokenizer(f"{row['word']} =")["input_ids"]
        target = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([inputs + target])).logits[0, len(inputs) - 1 : -1].log_softmax(-1)
        loss -= scores[range(len(target)), target].sum().item()
        count += len(target)
    assert summary["base_without_prompt"]["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert summary["before"]["loss"] != summary["base_without_prompt"]["loss"]


def train_and_read(folder: Path, num_ranks: int, **sections: dict) -> dict:
    """The summary of a run of one step."""
    folder.mkdir()
    rows = str(TINY / "data" / "validation.jsonl")
    given: dict = {
        "data": {"train": rows, "validation": rows},
        "train": {"max_steps": 1, "batch_size": 2},
        "evaluate": {"metrics": ["loss"], "num_samples": 0, "max_examples": 5},
    }
    config = write_config(folder / "config.json", **given | sections)
    done = run_command("train", str(config), num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_base_alone_does_not_depend_on_the_ranks(tmp_path, kind):
    model = {"path": str(build_tiny_base(kind, tmp_path / "base"))}
    one = train_and_read(tmp_path / "1", 1, model=model)
    two = train_and_read(tmp_path / "2", 2, model=model, deepspeed={"zero_optimization": {"stage": 3}})
    assert two["base_without_prompt"] == pytest.approx(one["base_without_prompt"], rel=1e-5)
    assert one["base_without_prompt"]["loss"] != one["before"]["loss"]


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        (
            "gpt2",
            [
                {"prompt": {"placement": "infix"}},
                {"prompt": {"method": "prefix_tuning", "from_layer": 1}, "sweep": {"seed": [0, 1]}},
            ],
        ),
        ("t5", [{"prompt": {"placement": "decoder"}}]),
    ],
)
def test_the_base_alone_is_one_whatever_is_trained_over_it(tmp_path: Path, kind: str, others: list[dict]):
    model = {"path": str(build_tiny_base(kind, tmp_path / "base"))}
    one = train_and_read(tmp_path / "one", 1, model=model)
    for i, sections in enumerate(others):
        other = train_and_read(tmp_path / str(i), 1, model=model, **sections)
        assert other["base_without_prompt"] == pytest.approx(one["base_without_prompt"], rel=1e-5)


def test_a_new_head_says_nothing_without_training(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": word, "label": word[0]}) + "\n" for word in ["ab", "bc", "ad", "be"]))
    data = {"train": str(rows), "validation": str(rows), "template": "{{ text }}", "target": "{{ label }}"}
    model = {"path": str(build_tiny_base("bert", tmp_path / "base"))}
    found = train_and_read(tmp_path / "one", 1, model=model, data=data | {"labels": ["a", "b"]})
    assert found["base_without_prompt"] == {} and found["before"]["loss"] > 0
