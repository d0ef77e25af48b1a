"""Multitask prompt tuning: step for step PEFT's for every family and stage, beside other methods, and from a source."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune_dist.prompts.store import load_prompt
from tests.commands import run_command, run_commands
from tests.conftest import LABELS
from tests.numerics.banks import check_members
from tests.numerics.methods import FEW, check_ways, pick, write_run, write_ways
from tests.numerics.plain import BATCH, NUM_STEPS, NUM_VIRTUAL, PEFT_TASK, load_plain, padded_batches, run_loop
from tests.numerics.plain import read_rows as read_plain_rows
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_families import starting_head

pytestmark = pytest.mark.long
WIDTH, RANKS = 32, 2
TASKS = ["upper", "lower", "other"]
PROMPT = {"method": "multitask_prompt_tuning", "num_ranks": RANKS}
PEFT_NAMES = {
    "shared_prompt": "embedding.weight",
    "task_cols": "prefix_task_cols",
    "task_rows": "prefix_task_rows",
}


def tasks_of(count: int) -> np.ndarray:
    """The number of each row's task: uneven, and in no order."""
    return np.random.default_rng(3).choice(len(TASKS), count, p=[0.6, 0.3, 0.1])


def start_of() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    shapes = {
        "shared_prompt": (NUM_VIRTUAL, WIDTH),
        "task_cols": (len(TASKS), NUM_VIRTUAL, RANKS),
        "task_rows": (len(TASKS), RANKS, WIDTH),
    }
    return {name: torch.randn(shape, generator=draw) * 0.6 for name, shape in shapes.items()}


def peft_curve(base_dir: Path, family: str = "causal", head=None, num_steps: int = NUM_STEPS) -> list[float]:
    """Losses of PEFT's class in a plain loop, each row with the number of its task.

    With two submodules, PEFT's default for seq2seq, training has virtual tokens of the decoder that answering lacks.
    """
    from peft import MultitaskPromptTuningConfig, get_peft_model

    base = load_plain(base_dir, family, head)
    settings = MultitaskPromptTuningConfig(
        task_type=PEFT_TASK[family], num_virtual_tokens=NUM_VIRTUAL, num_tasks=len(TASKS), num_ranks=RANKS,
        modules_to_save=["pooler"] if head else None, num_transformer_submodules=1,
    )  # fmt: skip
    model = get_peft_model(base, settings).eval()
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        for name, tensor in start_of().items():
            encoder.get_parameter(PEFT_NAMES[name]).copy_(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers = tasks_of(len(read_plain_rows()))
    order = iter(np.random.default_rng([0, 0]).permutation(len(numbers)).reshape(-1, BATCH))

    def loss_of(ids, mask, labels):
        task_ids = torch.tensor(numbers[next(order)])
        return model(input_ids=ids, attention_mask=mask, labels=labels, task_ids=task_ids).loss

    batches = padded_batches(AutoTokenizer.from_pretrained(base_dir), family)
    return run_loop(trained, loss_of, batches, num_steps=num_steps)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """rows.jsonl with a column `task_name`, few.jsonl with a row or more of each, and a file for each task."""
    folder = tmp_path_factory.mktemp("rows")
    found = read_plain_rows()
    numbers = tasks_of(len(found))
    named = [row | {"task_name": TASKS[number]} for row, number in zip(found, numbers, strict=True)]
    few = [np.flatnonzero(numbers == task)[place] for place in range(4) for task in (1, 0, 2)]
    few = [named[place] for place in few]
    for name, some in {"rows": named, "few": few}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for task in TASKS:
        own = [row for row, full in zip(found, named, strict=True) if full["task_name"] == task]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def data_of(rows: Path, **more) -> dict:
    return {"train": str(rows / "rows.jsonl"), "task": "task_name", "tasks": TASKS, **more}


@pytest.fixture(scope="module")
def runs(tiny_bases, rows, tmp_path_factory):
    """Every family on one rank, and a target that starts from one of them."""
    root = tmp_path_factory.mktemp("one")
    judged = {"evaluate": {"metrics": ["loss", "exact_match"], "every": 10, "num_samples": 12}}
    specs = []
    for kind in ("llama", "bloom", "t5", "bert"):
        classes = {"labels": LABELS, "target": "{{ label }}"} if kind == "bert" else {}
        validation = {"validation": str(rows / "few.jsonl")} if kind == "llama" else {}
        more = judged if validation else {}
        data = data_of(rows, **classes, **validation)
        specs.append(write_run(root, kind, tiny_bases[kind], PROMPT, start_of(), data=data, **more))
    for taken in ("average", "exact", "shared"):
        source = {"init": "file", "init_file": str(root / "llama"), "source_tasks": taken}
        source |= {"source_task": "lower"} if taken == "exact" else {}
        specs.append((write_run(root, taken, tiny_bases["llama"], PROMPT | source)[0], ["train.max_steps=2"]))
    files = {"data": {"train": None, "tasks": {task: {"train": str(rows / f"{task}.jsonl")} for task in TASKS}}}
    specs.append(write_run(root, "files", tiny_bases["llama"], PROMPT, start_of(), **files))
    return train_all(specs, root, num_ranks=1)


@pytest.mark.parametrize("kind, family", [("llama", "causal"), ("bloom", "causal"), ("t5", "seq2seq")])
def test_it_trains_as_under_peft(runs, tiny_bases, kind, family):
    assert curve(runs[kind]) == pytest.approx(peft_curve(tiny_bases[kind], family), rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


def test_an_encoder_trains_as_under_peft(runs, tiny_bases):
    head = starting_head(tiny_bases["bert"], "bert")
    assert curve(runs["bert"]) == pytest.approx(peft_curve(tiny_bases["bert"], "encoder", head), rel=1e-5)


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(tiny_bases, rows, tmp_path):
    base = tiny_bases["llama"]
    ways = pick("stage0", "small", "recomputed", "int8-0", "int8-3", "bf16-3")
    of_infix = pick("stage0", "cached")
    infix = PROMPT | {"placement": "infix"}
    specs = {
        "prefix": write_ways(tmp_path / "prefix", base, PROMPT, start_of(), ways, data=data_of(rows)),
        "infix": write_ways(tmp_path / "infix", base, infix, start_of(), of_infix, data=data_of(rows)),
    }
    alone = write_run(tmp_path, "alone", base, infix, start_of(), data=data_of(rows), train={"max_steps": FEW})
    wanted = {
        "prefix": peft_curve(base, num_steps=FEW),
        "infix": curve(train_all([alone], tmp_path, num_ranks=1)["alone"]),
    }
    check_ways(tmp_path, wanted, specs)


def test_members_train_as_alone(tiny_bases, rows, tmp_path):
    sweep = [
        {"prompt.method": "prompt_tuning"},
        {"prompt.method": "multitask_prompt_tuning", "prompt.num_virtual_tokens": 6, "seed": 1},
        {"prompt.method": "multitask_prompt_tuning", "prompt.num_ranks": 3, "data.tasks": TASKS[::-1]},
    ]
    check_members(tmp_path, tiny_bases["llama"], sweep, data=data_of(rows, template="{{ word }} ="))


def test_it_resumes_exactly(tiny_bases, rows, tmp_path):
    base = tiny_bases["llama"]
    whole, parts = (write_run(tmp_path, name, base, PROMPT, data=data_of(rows))[0] for name in ("whole", "parts"))
    constant = ["train.schedule=constant", "train.max_steps=6"]
    first = (parts, [constant[0], "train.max_steps=3"])
    train_all([(whole, constant), first, (parts, constant)], tmp_path, num_ranks=1)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_metrics_of_each_task_add_up_to_those_of_all(runs):
    summary = json.loads((runs["llama"] / "summary.json").read_text())
    for found in (summary["validation"], summary["before"], summary["base_without_prompt"]):
        assert np.mean([found[f"exact_match/{task}"] for task in TASKS]) == pytest.approx(found["exact_match"])
        assert min(found[f"loss/{task}"] for task in TASKS) < found["loss"] < max(found[f"loss/{t}"] for t in TASKS)


def answer_with(model, tokenizer, text: str, **more) -> str:
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        for _ in range(8):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, len(tokenizer.encode(text)) :], skip_special_tokens=True).strip()


def test_answers_and_exported_adapters_are_pefts(runs, tiny_bases, rows, tmp_path):
    from peft import PeftModel

    run = str(runs["llama"])
    file = str(rows / "few.jsonl")
    rows_out = tmp_path / "rows-out.jsonl"
    run_commands(
        [
            ["export", run, "--to", "peft", "--out", str(tmp_path / "all")],
            ["export", run, "--to", "peft", "--out", str(tmp_path / "lower"), "--task", "lower"],
            ["generate", run, "--input-file", file, "--max-new-tokens", "8", "--output", str(rows_out)],
            ["generate", run, "--input", "sample", "--task", "lower", "--max-new-tokens", "8",
             "--output", str(tmp_path / "one.jsonl")],
            ["evaluate", run],
        ]
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["llama"])

    def load(name: str) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(tiny_bases["llama"], dtype=torch.float32)
        return PeftModel.from_pretrained(base, tmp_path / name).eval()

    model = load("all")
    answers = [json.loads(line) for line in rows_out.read_text().splitlines()]
    for row in answers:
        task_ids = torch.tensor([TASKS.index(row["task_name"])])
        assert row["generated"] == answer_with(model, tokenizer, row["word"] + " =", task_ids=task_ids), row
    assert len({row["generated"] for row in answers}) > 1
    one = json.loads((tmp_path / "one.jsonl").read_text())["generated"]
    assert one == answer_with(model, tokenizer, "sample =", task_ids=torch.tensor([1]))
    assert one == answer_with(load("lower"), tokenizer, "sample =")
    evaluation = json.loads((runs["llama"] / "evaluation.json").read_text())
    validation = json.loads((runs["llama"] / "summary.json").read_text())["validation"]
    assert {key: evaluation[key] for key in validation} == pytest.approx(validation, rel=1e-6)
    samples = {sample["input"]: sample["answer"] for sample in evaluation["samples"]}
    some = [row for row in answers if row["word"] + " =" in samples]
    assert len(some) == 12 and all(samples[row["word"] + " ="].startswith(row["generated"][:3]) for row in some)


def test_labels_and_numbers_are_those_of_each_rows_task(tiny_bases, rows, tmp_path):
    classes = {"labels": LABELS, "target": " {{ label }}", "validation": str(rows / "few.jsonl")}
    specs = []
    for kind in ("llama", "bloom"):  # labels as trees, and one by one
        for name, metrics in {"loss": ["loss"], "accuracy": ["loss", "accuracy"]}.items():
            sections = {"data": data_of(rows, **classes), "evaluate": {"metrics": metrics, "num_samples": 0}}
            specs.append(write_run(tmp_path, f"{kind}-{name}", tiny_bases[kind], PROMPT, start_of(), **sections))
    numbers = {"target": "{{ word | length }}", "validation": str(rows / "few.jsonl")}
    sections = {"data": data_of(rows, **numbers), "evaluate": {"metrics": ["mse"]}}
    specs.append(write_run(tmp_path, "mse", tiny_bases["llama"], PROMPT, start_of(), **sections))
    runs = train_all([(path, ["train.max_steps=3"]) for path, _ in specs[:-1]] + [
        (specs[-1][0], ["train.max_steps=3", "train.objective=mse"])
    ], tmp_path, num_ranks=1)  # fmt: skip
    found = {name: json.loads((run / "summary.json").read_text())["validation"] for name, run in runs.items()}
    for kind in ("llama", "bloom"):
        for name, loss in found[f"{kind}-loss"].items():
            assert found[f"{kind}-accuracy"][name] == pytest.approx(loss, rel=1e-5), name
        assert f"accuracy/{TASKS[2]}" in found[f"{kind}-accuracy"]
    out = tmp_path / "numbers.jsonl"
    run_commands([["generate", str(runs["mse"]), "--input-file", str(rows / "few.jsonl"), "--output", str(out)]])
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    for task in TASKS:
        errors = [(float(r["generated"]) - len(r["word"])) ** 2 for r in answered if r["task_name"] == task]
        assert found["mse"][f"mse/{task}"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_task_is_asked_for_where_there_are_several(runs, tmp_path):
    run = str(runs["llama"])
    cases = {
        "--task: the run's prompt is of several tasks: name one of upper, lower, other": [
            "generate",
            run,
            "--input",
            "a",
        ],
        "--task: none is none of upper, lower, other": ["generate", run, "--input", "a", "--task", "none"],
        "--task: the run's prompt is not of several tasks": [
            "generate",
            str(runs["exact"]),
            "--input",
            "a",
            "--task",
            "b",
        ],
        "this prompt is of 3 tasks: choose one with --task": ["export", run, "--to", "prompt-embeds"],
    }
    for message, command in cases.items():
        failed = run_command(*command, *(["--out", str(tmp_path / "out")] if command[0] == "export" else []))
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr


def test_a_target_starts_from_what_it_takes_of_its_source(runs):
    source = load_prompt(runs["llama"] / "prompt")[0]
    adapters = {name: load_prompt(runs[name] / "prompt")[0] for name in ("average", "exact", "shared")}
    first = {name: curve(runs[name])[0] for name in adapters}
    assert len({round(loss, 6) for loss in first.values()}) == 3
    for name, tensors in adapters.items():
        # Two steps of Adam move a number by no more than 0.05 each.
        torch.testing.assert_close(tensors["shared_prompt"], source["shared_prompt"], rtol=0, atol=0.11)
        assert tensors["task_cols"].shape == (1, NUM_VIRTUAL, RANKS), name
    mean = source["task_cols"].mean(dim=0, keepdim=True)
    torch.testing.assert_close(adapters["average"]["task_cols"], mean, rtol=0, atol=0.11)
    torch.testing.assert_close(adapters["exact"]["task_cols"], source["task_cols"][1:2], rtol=0, atol=0.11)
    assert load_prompt(runs["exact"] / "prompt")[0]["virtual_tokens"].shape == (NUM_VIRTUAL, WIDTH)


def test_a_file_for_each_task_trains_on_the_same_rows(runs):
    """In another order, since the files follow each other; so the mean loss of an epoch's part is near."""
    facts = load_prompt(runs["files"] / "prompt")[1]
    assert facts["tasks"] == TASKS
    assert np.mean(curve(runs["files"])) == pytest.approx(np.mean(curve(runs["llama"])), rel=0.05)
    assert len(curve(runs["files"])) == NUM_STEPS


def test_pefts_adapter_holds_the_same_tensors(runs, tmp_path):
    run_commands([["export", str(runs["llama"]), "--to", "peft", "--out", str(tmp_path / "all")]])
    adapter = load_file(tmp_path / "all" / "adapter_model.safetensors")
    stored = load_prompt(runs["llama"] / "prompt")[0]
    names = {"prompt_embeddings": "shared_prompt", "prefix_task_cols": "task_cols", "prefix_task_rows": "task_rows"}
    assert set(adapter) == set(names)
    for name, own in names.items():
        assert torch.equal(adapter[name], stored[own])
    folded = stored["shared_prompt"] * (stored["task_cols"] @ stored["task_rows"])
    torch.testing.assert_close(stored["virtual_tokens"], folded)
