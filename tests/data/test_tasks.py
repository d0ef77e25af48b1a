"""Tasks of rows: named by a column or by files, and what is wrong with them in one line."""

import dataclasses
import json

import numpy as np
import pytest

from ptune_dist.config.load import load_config, render_config
from ptune_dist.data.batches import collate, idle_batch
from ptune_dist.data.build import build_split
from ptune_dist.data.encode import Encoding
from ptune_dist.data.framing import Framing, TextTargets
from ptune_dist.data.training_rows import join_examples
from ptune_dist.errors import UserError
from ptune_dist.prompts.build import check_options
from ptune_dist.run.resolve import resolve
from ptune_dist.tiny.make import build_tokenizer
from tests.conftest import write_config

ROWS = [{"word": word, "answer": word.upper(), "kind": kind} for word, kind in (("ab", "x"), ("c", "y"), ("de", "x"))]
NAMED = {"task": "kind", "tasks": ["y", "x"]}


@pytest.fixture
def rows(tmp_path):
    for name, some in {"all": ROWS, "x": ROWS[::2], "y": ROWS[1:2]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return tmp_path


def load(rows, *overrides: str, prompt=None, **data):
    path = write_config(rows / "config.json", data={"train": "all.jsonl"} | data, prompt=prompt or {})
    return load_config(path, list(overrides), resolve=resolve)


def split_of(config, which: str = "train"):
    tokenizer = build_tokenizer()
    encoding = Encoding(tokenizer, Framing(ends_input=False), TextTargets(tokenizer), 64)
    return build_split(config.data, encoding, which=which)


def error_of(rows, **data) -> str:
    with pytest.raises(UserError) as caught:
        split_of(load(rows, **data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_column_names_the_tasks_in_the_order_of_the_config(rows):
    split = split_of(load(rows, **NAMED))
    assert split.examples.tasks.tolist() == [1, 0, 1]
    batch = collate(split.examples, [[(1, (0,)), (2, (0,))]], 0, pad_id=0)
    assert batch.tasks == [0, 1]
    assert idle_batch(0, has_contexts=False).tasks == [0]
    assert split_of(load(rows)).examples.tasks is None


def test_other_tasks_are_other_examples_to_a_resumed_run(rows):
    digests = {split_of(load(rows, task="kind", tasks=tasks)).digest() for tasks in (["x", "y"], ["y", "x"])}
    assert len({*digests, split_of(load(rows)).digest()}) == 3


def test_members_with_and_without_tasks_are_joined(rows):
    joined = join_examples([split_of(load(rows)).examples, split_of(load(rows, **NAMED)).examples])
    assert joined.tasks.tolist() == [0, 0, 0, 1, 0, 1]


def test_files_name_the_tasks_and_the_template_finds_the_name(rows):
    files = {"x": {"train": "x.jsonl", "validation": "x.jsonl"}, "y": {"train": "y.jsonl"}}
    config = load(rows, train=None, tasks=files, template="{{ task }}: {{ word }}")
    assert config.data.train == str(rows / "x.jsonl")
    split = split_of(config)
    assert split.examples.tasks.tolist() == [0, 0, 1]
    tokenizer = build_tokenizer()
    texts = [tokenizer.decode(split.examples.input_ids(i), skip_special_tokens=True) for i in range(3)]
    assert texts == ["x: ab", "x: de", "y: c"]
    assert split.rows.where(2) == f"{rows / 'y.jsonl'} line 1" and split.rows.where(1) == f"{rows / 'x.jsonl'} line 2"
    assert [row["task"] for row in split.rows.read(1, 3)] == ["x", "y"] and split.rows.read(2, 9) == split.rows.read(
        2, 3
    )
    assert len(split.rows.first(2)) == 2 and [row["task"] for row in split.rows.first(2).read(0, 9)] == ["x", "y"]
    assert split_of(config, "validation").examples.tasks.tolist() == [0, 0]
    again = rows / "again.yaml"
    again.write_text(render_config(config))
    assert load_config(again, resolve=resolve) == config


def test_numbers_and_words_of_yaml_are_names(rows):
    (rows / "all.jsonl").write_text("".join(json.dumps(row | {"kind": i}) + "\n" for i, row in enumerate(ROWS)))
    path = rows / "numbers.yaml"
    text = render_config(load(rows)).replace("task: null", "task: kind")
    path.write_text(text.replace("tasks: null", "tasks: [2, 1, 0]"))
    assert split_of(load_config(path)).examples.tasks.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"task": "kind"}, "data.task needs data.tasks"),
        ({"tasks": ["x"]}, "data.tasks needs data.task"),
        ({"task": "kind", "tasks": []}, "data.tasks is empty"),
        ({"task": "kind", "tasks": ["x", "x"]}, "'x' is listed twice"),
        ({"task": "kind", "tasks": ["x", "Y"]}, "line 2: kind is 'y', which data.tasks does not list: x, Y; it"),
        ({"task": "sort", "tasks": ["x"]}, "data.task is column 'sort', which"),
        ({"tasks": {"x": {"train": "x.jsonl"}}}, "data.train is given, but data.tasks names the files of each task"),
        ({"train": None, "tasks": {"x": {"train": "no.jsonl"}}}, "data.tasks.x.train: no file"),
        ({"train": None, "tasks": {"x": {"file": "x.jsonl"}}}, "unknown key data.tasks"),
        ({"train": None, "task": "kind", "tasks": {"x": {"train": "x.jsonl"}}}, "has a column 'kind' already"),
        ({"train": None, "tasks": {"x": {"train": "x.txt"}}}, "is plain text, whose rows have no columns"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tasks_takes_one_line(rows, data, message):
    (rows / "x.txt").write_text("some text\n")
    assert message in error_of(rows, **data)


def test_options_of_tasks_are_refused_where_they_do_not_belong(rows):
    multitask = {"method": "multitask_prompt_tuning"}
    with pytest.raises(UserError, match="prompt.num_ranks is for multitask_prompt_tuning, this is prompt_tuning"):
        load(rows, prompt={"num_ranks": 2})
    with pytest.raises(UserError, match="prompt.num_ranks: "):
        load(rows, prompt=multitask | {"num_ranks": 0})
    with pytest.raises(UserError, match="prompt.source_tasks: "):
        load(rows, prompt=multitask | {"source_tasks": "some"})
    config = load(rows, prompt=multitask, **NAMED)
    assert check_options(config.prompt).num_ranks == 1 and config.prompt.init == "vocab"
    assert np.array_equal(dataclasses.replace(split_of(config).examples).tasks, [1, 0, 1])
