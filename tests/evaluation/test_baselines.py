"""`evaluate --baselines`: the base with the template, a written prompt and examples, as transformers reads them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune_dist.evaluation.baselines import render_baselines
from tests.commands import run_command
from tests.conftest import TINY, build_tiny_base, write_config

TRAIN = [{"word": word, "answer": word.upper()} for word in ("cat", "house", "tree", "river")]
HELD_OUT = [{"word": "dog", "answer": "DOG"}, {"word": "garden", "answer": "GARDEN"}]
TEXT = {"task": "In capitals.", "input": "Word: {{ template }}", "output": "Answer:"}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(folder: Path, **sections: dict) -> Path:
    """A run of three steps over the words, which has a prompt.text unless `sections` has another one."""
    folder.mkdir(exist_ok=True)
    data = {"train": write_rows(folder / "train.jsonl", TRAIN), "validation": write_rows(folder / "v.jsonl", HELD_OUT)}
    given: dict = {
        "prompt": {"num_virtual_tokens": 4, "text": TEXT},
        "data": data | {"template": "{{ word }}", "target": " {{ answer }}"},
        "train": {"max_steps": 3, "batch_size": 4},
        "evaluate": {"metrics": ["exact_match"], "num_samples": 0, "every": 0, "max_new_tokens": 4},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section if name != "deepspeed" else section
    config = write_config(folder / "config.json", **given)
    done = run_command("train", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run"


def evaluate(run: Path, *words: str, num_ranks: int = 1) -> dict:
    file = run.parent / f"{num_ranks}.json"
    done = run_command("evaluate", str(run), "--baselines", "--output", str(file), *words, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads(file.read_text())
    assert "\n".join(render_baselines(content)) + "\n" in done.stdout
    return content


def plain_loss(path: Path, write) -> float:
    """The loss per token of the validation rows, whose inputs `write` makes, by a plain loop."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    loss, count = 0.0, 0
    for row in HELD_OUT:
        inputs = tokenizer(write(row))["input_ids"]
        target = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            scores = model(torch.tensor([inputs + target])).logits[0, len(inputs) - 1 : -1].log_softmax(-1)
        loss -= scores[range(len(target)), target].sum().item()
        count += len(target)
    return loss / count


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("baselines"), prompt={"num_virtual_tokens": 4, "text": TEXT})


def test_all_baselines_are_what_transformers_reads(run):
    found = evaluate(run, "--shots", "2")
    rows = found["baselines"]
    assert list(rows) == ["template", "hard_prompt", "shots", "untrained", "trained"] and not found["left_out"]
    loss = {key: row["metrics"]["loss"] for key, row in rows.items()}

    def ask(row: dict) -> str:
        return f"Word: {row['word']}\nAnswer:"

    shown = rows["shots"]["first_input"]
    lead = shown.removesuffix(ask(HELD_OUT[0]))
    task, *examples, end = lead.split("\n\n")
    assert (task, end) == ("In capitals.", "")
    assert len(set(examples)) == 2
    assert set(examples) <= {f"{ask(row)} {row['answer']}" for row in TRAIN}
    base = TINY / "causal"
    assert loss["template"] == pytest.approx(plain_loss(base, lambda row: row["word"]), rel=1e-4)
    assert loss["hard_prompt"] == pytest.approx(plain_loss(base, lambda row: f"In capitals.\n{ask(row)}"), rel=1e-4)
    assert loss["shots"] == pytest.approx(plain_loss(base, lambda row: lead + ask(row)), rel=1e-4)
    summary = json.loads((run / "summary.json").read_text())
    assert loss["untrained"] == pytest.approx(summary["before"]["loss"], rel=1e-5)
    assert loss["trained"] == pytest.approx(summary["validation"]["loss"], rel=1e-5)
    assert len(set(loss.values())) == 5
    for row in rows.values():
        low, high = row["intervals_95"]["loss"]
        assert low <= row["metrics"]["loss"] <= high and row["num_rows"] == 2 and not row["num_truncated"]
    assert json.loads((run / "baselines.json").read_text()) == found


def test_the_text_of_training_is_the_text_of_use(run, tmp_path):
    to_peft = ["export", str(run), "--to", "peft", "--out", str(tmp_path / "adapter")]
    for command in (["evaluate", str(run)], to_peft):
        done = run_command(*command, "prompt.text=null")
        assert done.returncode == 2
        assert "prompt.text: the prompt of" in done.stderr and "was trained with 'In capitals.\\nWord: '" in done.stderr
    done = run_command(*to_peft)
    assert "was trained with 'In capitals.\\nWord: ' before and '\\nAnswer:' after data.template" in done.stdout


def test_ranks_that_share_the_base_find_the_same(tmp_path):
    base = build_tiny_base("t5", tmp_path / "base")
    run = train(tmp_path / "t5", model={"path": str(base)}, sweep={"seed": [0, 1]})
    one = evaluate(run, "--member", "seed=1", "--shots", "1")
    two = evaluate(run, "--member", "seed=1", "--shots", "1", "deepspeed={zero_optimization: {stage: 3}}", num_ranks=2)
    assert list(one["baselines"]) == ["template", "hard_prompt", "shots", "untrained", "trained"]
    for key, row in one["baselines"].items():
        assert two["baselines"][key]["metrics"] == pytest.approx(row["metrics"], rel=1e-5)
    example = one["baselines"]["shots"]["first_input"].split("\n\n")[1]
    assert example.splitlines()[:2] == [example.splitlines()[0], "Answer:"]  # the answer on a line of its own
    assert example.splitlines()[2].strip().isupper()


def test_what_a_base_cannot_answer_is_left_out_in_one_line(tmp_path):
    base = build_tiny_base("bert", tmp_path / "base")
    labels = {"target": "{{ word | length }}", "labels": ["3", "4", "5", "6"]}
    encoder = train(tmp_path / "bert", model={"path": str(base)}, data=labels, evaluate={"metrics": ["exact_match"]})
    found = evaluate(encoder)
    assert list(found["baselines"]) == ["untrained", "trained"]
    before = json.loads((encoder / "summary.json").read_text())["before"]
    assert found["baselines"]["untrained"]["metrics"] == pytest.approx(before, rel=1e-5)
    assert set(found["left_out"]) == {"template", "hard_prompt", "shots"}
    assert "its head is new" in found["left_out"]["shots"]
    tuned = train(tmp_path / "tuned", prompt={"method": "norms_only", "num_virtual_tokens": 0, "text": TEXT})
    found = evaluate(tuned, "--shots", "1")
    assert list(found["baselines"]) == ["template", "hard_prompt", "shots", "trained"]
    assert found["left_out"] == {"untrained": "norms_only starts as the base itself"}
    plain = plain_loss(TINY / "causal", lambda row: f"In capitals.\nWord: {row['word']}\nAnswer:")
    assert found["baselines"]["hard_prompt"]["metrics"]["loss"] == pytest.approx(plain, rel=1e-4)


def test_examples_that_do_not_fit_are_left_out_and_a_start_is_a_hard_prompt(tmp_path):
    base = build_tiny_base("gpt2", tmp_path / "base")  # 128 positions
    prompt = {"num_virtual_tokens": 4, "init_text": "Say {it} loud:", "text": None}
    data = {"template": f"{'x' * 30} {{{{ word }}}}"}
    run = train(tmp_path / "gpt2", model={"path": str(base)}, prompt=prompt, data=data)
    found = evaluate(run)
    assert found["baselines"]["hard_prompt"]["first_input"].startswith("Say {it} loud:\nxxx")
    assert found["num_shots"] == 1 and "--shots: 4 examples and the longest row need" in found["notes"][0]
    assert found["baselines"]["shots"]["name"] == "base, 1 example in the prompt"
    assert found["baselines"]["shots"]["num_truncated"] == 0
