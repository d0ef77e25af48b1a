"""`validate` refuses what `train` refuses, and both warn of the same odd rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from ptune_dist.data.examples import CHUNK_ROWS, Examples
from ptune_dist.data.sources import load_rows
from ptune_dist.data.template import compile_template
from ptune_dist.evaluation.row_warnings import count_same, warn_of_length, warn_of_templates
from ptune_dist.evaluation.validate import spread
from tests.conftest import write_config

ROWS = [{"text": f"word {i}", "label": ["positive", "negative"][i % 2]} for i in range(8)]
DATA = {"template": "{{ text }} =", "target": " {{ label }}", "labels": ["positive", "negative"]}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def write(tmp_path):
    """A config over small files; `rows` and `held_out` are theirs."""

    def write_run(rows=ROWS, held_out=None, data=None, **sections) -> Path:
        files = {"train": write_rows(tmp_path / "train.jsonl", rows)}
        if held_out:
            files["validation"] = write_rows(tmp_path / "held_out.jsonl", held_out)
        sections = {"train": {"max_steps": 2, "batch_size": 4}, **sections}
        return write_config(tmp_path / "c.json", data=files | DATA | (data or {}), **sections)

    return write_run


REFUSED = {
    "whitespace": ({"rows": [{"text": "a", "label": "positive "}]}, "by whitespace only"),
    "unknown label": ({"rows": [*ROWS, {"text": "w", "label": "neutral"}]}, "train.jsonl line 9: label is 'neutral'"),
    "held out": ({"held_out": [{"text": "w", "label": "neutral"}]}, "held_out.jsonl line 1: label is 'neutral'"),
    "same file": (
        {
            "rows": [{"text": "a", "label": "Positive"}],
            "held_out": [{"text": "a", "label": "Positive"}],
            "evaluate": {"metrics": ["accuracy"]},
        },
        "by upper and lower case",
    ),
    "marker": (
        {
            "rows": [{"text": "a", "label": "positive", "prompt": "b"}],
            "data": {"template": "{{ text }}{{ prompt }}"},
            "prompt": {"placement": "template"},
        },
        "has a column 'prompt', and with prompt.placement=template",
    ),
    "unused": ({"data": {"optional_columns": ["txt"]}}, "data.optional_columns: no template uses 'txt'; did you mean"),
    "references": ({"held_out": ROWS, "data": {"references": "other"}}, "data.references is column 'other'"),
    "missing": ({"rows": [{"text": None, "label": "positive"}]}, "{% if text %} or list it in data.optional_columns"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_validate_refuses_what_train_refuses(commands, write, case):
    sections, expected = REFUSED[case]
    config = write(**sections)
    found = [commands.run(command, config) for command in ("validate", "train")]
    assert [done.code for done in found] == [2, 2]
    assert found[0].errors == found[1].errors and expected in found[0].errors[0]


WARNED = {
    "the first rows are the same": (
        {"held_out": [*ROWS[:2], {"text": "new", "label": "positive"}]},
        "2 of the 3 validation rows are training rows too",
    ),
    "batch": (
        {"train": {"max_steps": 3, "batch_size": 1000}},
        "1,000 is more than the 8 training rows",
    ),
    "part of an epoch": ({"train": {"max_steps": 1, "batch_size": 4}}, "reads only 4 of the 8 training rows"),
    "more held out": ({"rows": ROWS[:4], "held_out": ROWS}, "more validation rows (8) than training rows (4)"),
    "braces": ({"data": {"template": "{text} ="}}, "data.template has {text}, which is plain text: write {{ text }}"),
    "no column": ({"data": {"template": "Review:"}}, "data.template uses no column: every row has the same input"),
    "constant": (
        {"data": {"target": "x", "labels": None}},
        "data.target uses no column: every row",
    ),
    "equal": ({"rows": ROWS[::2]}, "all 4 training rows have the same target"),
    "equal inputs": ({"rows": [row | {"text": "a"} for row in ROWS]}, "all 8 training rows have the same input"),
    "absent": (
        {"data": {"template": "{{ text }}{% if txet %}{{ txet }}{% endif %}"}},
        "the column 'txet'; did you",
    ),
    "cut": (
        {"prompt": {"init": "text", "init_text": "classify this"}},
        "prompt.init_text has 13 tokens and the prompt 4 virtual tokens: the last 9 tokens are left out",
    ),
    "cut prompt.text": (
        {"prompt": {"init": "text", "text": {"task": "classify"}}},
        "prompt.text has 9 tokens and the prompt 4 virtual tokens: the last 5 tokens are left out",
    ),
    "text after a cue": (
        {"prompt": {"text": {"task": "classify", "output": "Answer with one word."}}},
        "prompt.text.output stands between data.template, which ends with '{{ text }} =', and the target",
    ),
    "cut rows": (
        {"prompt": {"method": "prefix_tuning", "init": "rows", "init_rows": 2}},
        "prompt.init_rows: the first 2 rows have ",
    ),
    "cut example": (
        {"prompt": {"method": "cpt", "num_virtual_tokens": 20}},
        "prompt.num_virtual_tokens: the first 2 rows have 36 tokens and the prompt 20: the first 16 tokens are",
    ),
    "short answers": (
        {"held_out": ROWS, "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 3}},
        "evaluate.max_new_tokens 3 is less than the targets of 8 of the 8 validation rows have, up to 10",
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_validate_warns_of_odd_rows(commands, write, case):
    sections, expected = WARNED[case]
    done = commands.run("validate", write(**sections))
    assert done.code == 0, done.err
    found = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert [expected in line for line in found].count(True) == 1, found


def test_train_warns_as_validate_does_and_nothing_is_said_of_ordinary_rows(commands, write, tmp_path):
    deepspeed = {"zero_optimization": {"stage": 0}, "flops_profiler": {"enabled": True}}
    odd = write(held_out=ROWS[:3], train={"max_steps": 1, "batch_size": 1000}, deepspeed=deepspeed)
    kinds = ("warning: ", "deepspeed: no effect: flops_profiler")
    said = [
        {line for line in commands.run(command, odd).out.splitlines() if line.startswith(kinds)}
        for command in ("validate", "train")
    ]
    [at_the_end] = said[1] - said[0]  # of a single step
    assert at_the_end.startswith("warning: the trained prompt is no better than the base alone")
    assert said[0] <= said[1] and len(said[0]) == 3
    ordinary = write(held_out=[{"text": "new", "label": "positive"}], output_dir=str(tmp_path / "other"))
    done = commands.run("validate", ordinary)
    assert done.code == 0 and "warning" not in done.out


def test_examples_are_spread_over_the_file(commands, write):
    done = commands.run("validate", write(rows=[{"text": f"w{i}", "label": "positive"} for i in range(101)]))
    shown = [line for line in done.out.splitlines() if line.startswith("<virtual tokens>")]
    assert [line.split("=")[0].strip() for line in shown] == [f"<virtual tokens>w{i}" for i in (0, 25, 50, 75, 100)]
    assert spread(1, 5) == [0] and spread(3, 5) == [0, 1, 2]


def examples_of(rows: list[tuple[list[int], list[int]]], numbers: list[float] | None = None) -> Examples:
    ids = [np.array([*text, *target], np.int32) for text, target in rows]
    return Examples(
        np.concatenate(ids),
        np.concatenate([[0], np.cumsum([len(row) for row in ids])]),
        np.array([len(target) for _, target in rows], np.int32),
        np.array(False),
        str,
        numbers=None if numbers is None else np.array(numbers),
    )


def test_rows_are_the_same_where_all_tokens_and_the_target_are():
    train = examples_of([([1, 2], [3]), ([1], [2, 3]), ([4] * 20, [5]), ([4] * 20, [5])])
    assert count_same(train, train) == 4
    assert count_same(train, examples_of([([1, 2], [3]), ([1, 2], [3]), ([1, 2, 3], [4])])) == 2
    assert count_same(train, examples_of([([4] * 9 + [7] + [4] * 10, [5])])) == 0
    assert count_same(train, examples_of([([], [1, 2, 3])])) == 0
    assert count_same(examples_of([([1], [0])], [0.5]), examples_of([([1], [0]), ([1], [0])], [0.5, 1.0])) == 1


def test_rows_of_several_chunks_are_compared():
    many = np.arange(CHUNK_ROWS + 5)
    train = examples_of([([int(i)], [1]) for i in many])
    assert count_same(train, examples_of([([0], [1]), ([CHUNK_ROWS + 4], [1]), ([CHUNK_ROWS + 5], [1])])) == 2


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (10, 0), (2000, 1)])
def test_few_and_many_epochs(write, steps, expected):
    from ptune_dist.config.load import load_config

    config = load_config(write(train={"max_steps": steps, "batch_size": 4}))
    assert len(list(warn_of_length(config, 40))) == expected


@pytest.mark.parametrize(
    ("template", "target", "shared"),
    [
        ("{{ text }} {{ label }}", "{{ label }}", "label"),
        ("{% if label %}x{% endif %}{{ text }}", "{{ ['no', 'yes'][label | int] }}", "label"),
        ("{{ m[0].content }}{{ m[-1].content | trim }}", "{{ m[-1].content }}", "m[-1].content"),
        ("{{ m[0].content }}", "{{ m[-1].content }}", None),
        ("{{ text[:3] }}", "{{ text[3:] }}", None),
        ("{{ text.split()[0] }}", "{{ text.split()[1] }}", None),
        ("{{ text }} {{ choices | join(', ') }}", "{{ choices[label | int] }}", None),
    ],
)
def test_an_answer_that_stands_in_the_input_is_named(tmp_path, template, target, shared):
    chat = [{"content": "q"}, {"content": "a"}]
    row = {"text": "a text", "label": "1", "m": chat, "choices": ["x", "y"]}
    rows = load_rows(write_rows(tmp_path / "a.jsonl", [row]), key="data.train", default_split="train")
    templates = (compile_template(template, key="data.template"), compile_template(target, key="data.target"))
    line = f"data.template and data.target both use {shared}: the answer may stand in the input"
    assert list(warn_of_templates(templates, rows)) == ([line] if shared else [])
