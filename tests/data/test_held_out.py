"""Validation rows drawn from the training rows, several sources of rows, and a number of examples."""

import json

import numpy as np
import pytest

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.held_out import FILE, choose_held_out, read_held_out
from ptune_dist.data.split_rows import load_source_rows, load_sources, load_split
from ptune_dist.errors import UserError
from tests.conftest import write_config


def write_rows(path, numbers):
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))
    return str(path)


def data_of(train, **keys) -> DataConfig:
    return DataConfig(train=train, template="{{ n }}", target="{{ n }}", **keys)


def read_split(data: DataConfig, which: str, folder=None) -> list[int]:
    source = load_source_rows(data)
    held_out = (read_held_out(data, folder) or choose_held_out(data, source)) if data.holds_out else None
    rows = load_split(data, which, held_out, lambda: source)
    assert len(rows) == len(rows.read(0, len(rows)))
    return [row["n"] for row in rows.read(0, len(rows))]


@pytest.mark.parametrize("asked, count", [(0.1, 4), (0.001, 1), (7, 7), ("0.5", 20), ("7", 7)])
def test_the_splits_share_no_row_and_miss_none(tmp_path, asked, count):
    data = data_of(write_rows(tmp_path / "a.jsonl", range(40)), validation=asked)
    train, held_out = read_split(data, "train"), read_split(data, "validation")
    assert len(held_out) == count
    assert sorted(train + held_out) == list(range(40))
    assert read_split(data, "validation") == held_out
    other = data.model_copy(update={"split_seed": 1})
    assert count > 30 or count < 4 or read_split(other, "validation") != held_out


def test_of_a_text_the_last_lines_are_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(10)))
    data = DataConfig(train=str(tmp_path / "a.txt"), validation=0.2)
    rows = load_split(data, "validation", choose_held_out(data, load_source_rows(data)), lambda: load_source_rows(data))
    assert [row["text"] for row in rows.read(0, 9)] == ["line 8\n", "line 9\n"]


def test_rows_are_named_by_their_own_lines(tmp_path):
    sources = [write_rows(tmp_path / "a.jsonl", range(5)), write_rows(tmp_path / "b.jsonl", range(5, 9))]
    data = data_of(sources, validation=3)
    held_out = choose_held_out(data, load_source_rows(data))
    rows = load_split(data, "validation", held_out, lambda: load_source_rows(data))
    for place, number in enumerate(held_out.rows.tolist()):
        file, line = ("a", number + 1) if number < 5 else ("b", number - 4)
        assert rows.where(place) == f"{tmp_path / file}.jsonl line {line}"


def test_several_sources_are_read_one_after_another(tmp_path):
    sources = [write_rows(tmp_path / f"{i}.jsonl", range(4 * i, 4 * i + 4)) for i in range(3)]
    rows = load_sources(data_of(sources), "train")
    assert [row["n"] for row in rows.read(0, 12)] == list(range(12))
    assert [row["n"] for row in rows.read(3, 9)] == list(range(3, 9))
    assert [row["n"] for row in rows.first(6).read(0, 12)] == list(range(6))
    assert len(rows.first(6)) == 6 and rows.columns() == ["n"]
    assert read_split(data_of(sources, max_examples=5), "train") == list(range(5))


def test_a_pattern_is_the_files_that_it_names_in_order(tmp_path):
    for name in ("b", "a", "c"):
        write_rows(tmp_path / f"{name}.jsonl", [name])
    path = write_config(tmp_path / "config.json", data={"train": "[ab].jsonl"})
    assert load_config(path).data.train == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    listed = f"data.train=[{tmp_path}/c.jsonl, '{tmp_path}/[ab].jsonl']"
    assert [source[-7] for source in load_config(path, [listed]).data.train_sources] == ["c", "a", "b"]


def test_what_a_run_has_stored_is_kept(tmp_path):
    data = data_of(write_rows(tmp_path / "a.jsonl", range(40)), validation=4)
    held_out = choose_held_out(data, load_source_rows(data))
    content = held_out.content() | {"validation_rows": [1, 2, 3, 5]}  # as another version would have drawn them
    (tmp_path / FILE).write_text(json.dumps(content))
    assert read_split(data, "validation", tmp_path) == [1, 2, 3, 5]
    stored = read_held_out(data, tmp_path)
    assert stored and not stored.is_fresh
    (tmp_path / FILE).write_text(json.dumps(held_out.content()))
    stored = read_held_out(data, tmp_path)
    assert stored and stored.is_fresh and np.array_equal(stored.rows, held_out.rows)
    assert read_held_out(data.model_copy(update={"validation": 5}), tmp_path) is None


def test_rows_that_changed_since_are_one_line(tmp_path):
    data = data_of(write_rows(tmp_path / "a.jsonl", range(40)), validation=4)
    (tmp_path / FILE).write_text(json.dumps(choose_held_out(data, load_source_rows(data)).content()))
    write_rows(tmp_path / "a.jsonl", range(41))
    with pytest.raises(UserError, match=r"^data.train: .* has 41 rows, and had 40 when the run drew its [^\n]*$"):
        read_split(data, "validation", tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match=r"split.json is damaged: restore it"):
        read_split(data, "validation", tmp_path)


@pytest.mark.parametrize("asked", [40, 400, 0.99])
def test_a_split_leaves_rows_to_train_on(tmp_path, asked):
    data = data_of(write_rows(tmp_path / "a.jsonl", range(40)), validation=asked)
    with pytest.raises(UserError, match=r"^data.validation: [\d.]+ takes \d+ rows, and data.train has 40$"):
        choose_held_out(data, load_source_rows(data))


@pytest.mark.parametrize(
    "override, says",
    [
        ("data.validation=0", "data.validation: a file, a number of the training rows, or a share"),
        ("data.validation=-3", "data.validation: a file, a number of the training rows, or a share"),
        ("data.validation=1.5", "data.validation: a file, a number of the training rows, or a share"),
        ("data.train=[]", "data.train: a path or a name is needed, and the list is empty"),
        ("data.train=['', a.jsonl]", "data.train: a path or a name is needed, and it is empty"),
        ("data.max_examples=0", "data.max_examples: "),
        ("data.split_seed=-1", "data.split_seed: "),
    ],
)
def test_what_is_no_source_is_one_line(tmp_path, override, says):
    with pytest.raises(UserError) as caught:
        load_config(write_config(tmp_path / "config.json"), [override])
    assert f": {says}" in str(caught.value) and "\n" not in str(caught.value)


def test_sources_that_cannot_be_read_together_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(UserError, match=r"^data.train: .*a.txt is plain text and .*b.jsonl has rows: give files of"):
        load_sources(data_of([write_rows(tmp_path / "b.jsonl", [1]), str(tmp_path / "a.txt")]), "train")
    with pytest.raises(UserError, match=r"^data.train: no file matches .*/x\*.jsonl$"):
        load_sources(data_of(str(tmp_path / "x*.jsonl")), "train")
