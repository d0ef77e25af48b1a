"""Regression: an encoder's one-output head, and a linear head over one hidden state of a language model, learn numbers
as a plain loop does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ptune_dist.base.load import fill_whole
from ptune_dist.families.find import open_any
from ptune_dist.model.value_head import TargetScale, ValueHeads, measure_scale
from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.numerics.methods import write_run
from tests.numerics.plain import BATCH, NUM_STEPS, initial_vectors, pad, read_rows, run_loop, with_prompt
from tests.numerics.test_curves import curve, train_all, zero_json
from tests.numerics.test_families import write_rows

pytestmark = pytest.mark.long
KINDS = ["llama", "bloom", "t5", "bert"]
START = {"virtual_tokens": initial_vectors(32)}
HELD_OUT = 12


def score(row: dict[str, str]) -> float:
    return 100.0 + 7.5 * len(row["word"])


def scored(rows: list[dict[str, str]]) -> list[dict]:
    return [row | {"score": score(row)} for row in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """Section `data`, with validation rows."""
    folder = tmp_path_factory.mktemp("data")
    rows = scored(read_rows())
    return {
        "train": str(write_rows(folder / "train.jsonl", rows)),
        "validation": str(write_rows(folder / "held_out.jsonl", rows[:HELD_OUT])),
        "target": "{{ score }}",
    }


@pytest.fixture(scope="module")
def runs(tiny_bases, data, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    sections = {
        "data": data,
        "train": {"objective": "mse"},
        "evaluate": {"every": 0, "metrics": ["mse", "pearson", "spearman"], "best_metric": "mse"},
    }
    specs = [write_run(root, kind, tiny_bases[kind], {}, START, **sections) for kind in KINDS]
    sharded = sections | {"deepspeed": zero_json(3), "train": {"objective": "mse", "micro_batch_tokens": 60}}
    sharded_specs = [write_run(root, f"{kind}-3", tiny_bases[kind], {}, START, **sharded) for kind in KINDS]
    return train_all(specs, root, num_ranks=1) | train_all(sharded_specs, root, num_ranks=2)


def plain_curve(base_dir: Path, kind: str) -> list[float]:
    """AdamW over prompt and head, on standardized targets."""
    auto = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification}.get(kind, AutoModelForCausalLM)
    options = {"num_labels": 1} if kind == "bert" else {}
    base = auto.from_pretrained(base_dir, dtype=torch.float32, **options).eval().requires_grad_(False)
    prompt = torch.nn.Parameter(START["virtual_tokens"].clone())
    head = []
    if kind == "bert":
        started = fill_whole(open_any(str(base_dir), dtype=torch.float32, seed=0))
        first = {name: p.detach().clone() for name, p in started.named_parameters() if p.requires_grad}
        assert not base.load_state_dict(first, strict=False).unexpected_keys
        head = [base.get_parameter(name).requires_grad_() for name in first]
    else:
        (linear,) = ValueHeads(base, 1)
        head = list(linear.parameters())
    rows = scored(read_rows())
    numbers = np.array([row["score"] for row in rows])

    def loss_of(ids, mask, targets):
        inputs = with_prompt(base, prompt, ids, mask)
        if kind == "bert":
            found = base(**inputs).logits[:, 0]
        elif kind == "t5":
            start = torch.full((len(ids), 1), base.config.decoder_start_token_id)
            hidden = base(**inputs, decoder_input_ids=start, output_hidden_states=True).decoder_hidden_states[-1][:, 0]
            hidden = hidden * base.model_dim**-0.5 if base.config.tie_word_embeddings else hidden
            found = linear(hidden)[:, 0]
        else:
            hidden = base(**inputs, output_hidden_states=True).hidden_states[-1]
            last = inputs["attention_mask"].sum(dim=1) - 1
            found = linear(hidden[torch.arange(len(ids)), last])[:, 0]
        return torch.nn.functional.mse_loss(found, targets)

    return run_loop([prompt, *head], loss_of, number_batches(base_dir, rows, numbers))


def number_batches(base_dir: Path, rows: list[dict], numbers: np.ndarray):
    """Ids, mask and standardized targets of each step, in the documented order."""
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    standard = (numbers - numbers.mean()) / numbers.std()
    order = np.random.default_rng([0, 0]).permutation(len(rows))
    for step in range(NUM_STEPS):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        texts = [tokenizer.encode(rows[i]["word"] + " =") for i in chosen]
        mask = pad([[1] * len(text) for text in texts], 0)
        yield pad(texts, 1), mask, torch.tensor(standard[chosen], dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_a_plain_loop_at_any_stage(runs, tiny_bases, kind):
    wanted = plain_curve(tiny_bases[kind], kind)
    assert curve(runs[kind]) == pytest.approx(wanted, rel=1e-5)
    assert curve(runs[f"{kind}-3"]) == pytest.approx(wanted, rel=1e-5)
    for run in (runs[kind], runs[f"{kind}-3"]):
        hashes = json.loads((run / "base_hashes.json").read_text())
        assert hashes["after"] == hashes["before"] and hashes["before"]


def test_answers_are_numbers_in_the_original_unit_and_metrics_are_theirs(runs, data, tmp_path):
    commands = []
    for kind in KINDS:
        output = ["--output", str(tmp_path / f"{kind}.jsonl")]
        commands.append(["generate", str(runs[kind]), "--input-file", data["validation"], *output])
        commands.append(["evaluate", str(runs[kind])])
    run_commands(commands)
    wanted = np.array([score(row) for row in read_rows()[:HELD_OUT]])
    for kind in KINDS:
        lines = (tmp_path / f"{kind}.jsonl").read_text().splitlines()
        answers = np.array([float(json.loads(line)["generated"]) for line in lines])
        assert abs(answers.mean() - wanted.mean()) < 3 * wanted.std(), kind  # near 150, not near 0
        found = json.loads((runs[kind] / "evaluation.json").read_text())
        assert found["mse"] == pytest.approx(np.square(answers - wanted).mean(), rel=1e-3), kind
        assert found["pearson"] == pytest.approx(np.corrcoef(answers, wanted)[0, 1], rel=1e-3), kind
        assert found["mse"] == pytest.approx(
            json.loads((runs[kind] / "summary.json").read_text())["validation"]["mse"], rel=1e-5
        )


def test_the_head_and_the_scale_are_stored_and_exported_where_peft_has_them(runs, tmp_path):
    tensors, facts = load_prompt(runs["llama"] / "prompt")
    assert {"value_head.weight", "value_head.bias"} < set(tensors)
    numbers = np.array([score(row) for row in read_rows()])
    scale = {"mean": pytest.approx(numbers.mean()), "std": pytest.approx(numbers.std())}
    assert facts["objective"] == "mse" and facts["target_scale"] == scale
    failed = run_command("export", str(runs["llama"]), "--to", "peft", "--out", str(tmp_path / "no"))
    assert failed.returncode == 2 and "no head that answers numbers" in failed.stderr
    assert run_command("export", str(runs["bert"]), "--to", "peft", "--out", str(tmp_path / "yes")).returncode == 0


def test_wrong_targets_metrics_and_options_are_one_line_each(runs, tmp_path):
    config = str(runs["llama"] / "config.json")
    bad = write_rows(
        tmp_path / "bad.jsonl",
        [row | {"score": text} for row, text in zip(read_rows()[:2], ["1.5", "high"], strict=True)],
    )
    cases = {
        "bad.jsonl line 2: data.target is 'high', but train.objective needs a plain decimal number": [f"data.train={bad}"],
        "evaluate.metrics: exact_match is for texts": ["evaluate.metrics=[exact_match]", "evaluate.best_metric=null"],
        "train.label_smoothing is for cross_entropy, this is mse": ["train.label_smoothing=0.1"],
        "train.objective: mae is none of cross_entropy, mse": ["train.objective=mae"],
        "evaluate.metrics: mse is for numbers": ["train.objective=cross_entropy"],
    }
    for message, overrides in cases.items():
        failed = run_command("train", config, f"output_dir={tmp_path / 'no'}", *overrides)
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr
        assert failed.stderr.strip().count("\n") == 0, failed.stderr


def test_label_smoothing_is_torchs_in_training_and_absent_in_validation(tiny_bases, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", read_rows())
    data = {"train": str(rows), "validation": str(rows)}
    base = tiny_bases["llama"]
    sections = {"data": data, "evaluate": {"every": 0, "max_examples": BATCH}, "train": {"max_steps": 1}}
    smooth = sections | {"train": {"max_steps": 1, "label_smoothing": 0.2}}
    specs = [write_run(tmp_path, "hard", base, {}, START, **sections)]
    specs += [write_run(tmp_path, "smooth", base, {}, START, **smooth)]
    runs = train_all(specs, tmp_path, num_ranks=1)
    before = [json.loads((run / "summary.json").read_text())["before"]["loss"] for run in runs.values()]
    assert before[0] == before[1]
    assert curve(runs["smooth"])[0] == pytest.approx(plain_smooth_loss(base), rel=1e-5)
    assert curve(runs["smooth"])[0] != pytest.approx(curve(runs["hard"])[0], rel=1e-3)


def plain_smooth_loss(base_dir: Path) -> float:
    from tests.numerics.plain import NUM_VIRTUAL, load_plain, padded_batches

    base = load_plain(base_dir)
    ids, mask, labels = next(padded_batches(AutoTokenizer.from_pretrained(base_dir)))
    with torch.no_grad():
        logits = base(**with_prompt(base, START["virtual_tokens"], ids, mask)).logits[:, NUM_VIRTUAL - 1 : -1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.2
        ).item()


@pytest.mark.parametrize("number", [0.7, 7.0, -1e9])
def test_targets_that_are_all_equal_keep_their_unit(number):
    assert measure_scale(np.full(100, number)) == TargetScale(pytest.approx(number), 1.0)
