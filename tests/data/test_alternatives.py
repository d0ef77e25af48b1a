"""Several acceptable answers: an epoch trains on one of them, metrics compare with all; and rows that are skipped."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.alternatives import find_path
from ptune_dist.data.build import Split, build_split
from ptune_dist.data.encode import Encoding
from ptune_dist.data.framing import Framing, TextTargets
from ptune_dist.data.references import build_references
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.errors import UserError
from ptune_dist.evaluation.splits import RunRows, describe_skipped
from tests.conftest import TINY

ROWS = [
    {"q": "a", "refs": ["one", "two", "three"], "meta": {"refs": ["x"]}},
    {"q": "b", "refs": ["four"], "meta": {"refs": ["y", "z"]}},
    {"q": "c", "refs": "five", "meta": {"refs": ["w"]}},
]


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "causal")
    return Encoding(tokenizer, Framing(ends_input=False), TextTargets(tokenizer, append_eos=False), 64)


def data_of(tmp_path, rows=ROWS, **keys) -> DataConfig:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"template": "{{ q }}=", "target": " {{ refs }}", "references": "refs"} | keys
    return DataConfig(train=str(file), validation=str(file), **given)


def targets_of(split: Split, encoding: Encoding) -> list[str]:
    return [encoding.tokenizer.decode(split.examples.target_ids(i)) for i in range(len(split.examples))]


def lines_of(skipped: list[str]) -> list[str]:
    return [line.partition(": ")[0].rpartition(" ")[2] for line in skipped]


def test_each_epoch_trains_on_one_reference_of_every_row(tmp_path, encoding):
    split = build_split(data_of(tmp_path), encoding, which="train")
    texts = targets_of(split, encoding)
    assert texts == [" one", " two", " three", " four", " five"]
    assert split.num_rows == 3
    rows = TrainingRows({"a": split, "b": split}, batch_size=3, seeds={"a": 0, "b": 1})
    epochs = [rows.of_step(step, ["a", "b"]) for step in range(1, 21)]
    for read in epochs:
        for own in read.values():
            assert sorted(texts[i] for i in own if i > 2) == [" five", " four"] and len(own) == 3
    drawn = {name: [next(i for i in read[name] if i < 3) for read in epochs] for name in "ab"}
    assert set(drawn["a"]) == {0, 1, 2} and drawn["a"] != drawn["b"]
    again = TrainingRows({"a": split}, batch_size=3, seeds={"a": 0})
    assert [again.of_step(step, ["a"])["a"] for step in (7, 2)] == [epochs[6]["a"], epochs[1]["a"]]


def test_validation_has_the_first_reference_as_target_and_all_for_metrics(tmp_path, encoding):
    data = data_of(tmp_path)
    split = build_split(data, encoding, which="validation")
    assert targets_of(split, encoding) == [" one", " four", " five"]
    assert build_references(data, split.rows) == [["one", "two", "three"], ["four"], ["five"]]


def test_a_list_below_a_column_is_chosen_from_too(tmp_path, encoding):
    data = data_of(tmp_path, target="{{ meta.refs | trim }}", references="meta.refs")
    split = build_split(data, encoding, which="train")
    assert targets_of(split, encoding) == ["x", "y", "z", "w"]


@pytest.mark.parametrize(
    "target, is_chosen",
    [
        ("{{ refs }}", True),
        (" {{ refs | trim | lower }}.", True),
        ("{{ refs[0] }}", False),
        ("{{ refs | join(', ') }}", False),
        ("{{ refs | first }}", False),
        ("{{ refs | length }}", False),
        ("{% for r in refs %}{{ r }}{% endfor %}", False),
        ("{{ refs }}{{ refs[0] }}", False),
        ("{{ q }}", False),
    ],
)
def test_a_template_that_chooses_by_itself_is_left_alone(target, is_chosen):
    assert bool(find_path(DataConfig(train="-", target=target, references="refs"))) == is_chosen
    assert find_path(DataConfig(train="-", target=target)) == []


def test_an_empty_list_is_one_line(tmp_path, encoding):
    data = data_of(tmp_path, [{"q": "a", "refs": []}])
    with pytest.raises(UserError, match=r"line 1: column 'refs', which data.target uses, is missing or null"):
        build_split(data, encoding, which="train")


def test_rows_that_cannot_be_used_are_skipped_and_named(tmp_path, encoding):
    rows = [{"q": "a", "refs": []}, *ROWS, {"q": None, "refs": "x"}, {"q": "d", "refs": ["y" * 99, "six"]}]
    rows.append({"q": None, "refs": ["u", "v"]})
    split = build_split(data_of(tmp_path, rows, on_error="skip"), encoding, which="train")
    assert targets_of(split, encoding) == [" one", " two", " three", " four", " five", " six"]
    assert (lines_of(split.skipped.whole), lines_of(split.skipped.in_part)) == (["1", "5", "7"], ["6"])
    whole = RunRows(TrainingRows({"a": split}, batch_size=1, seeds={"a": 0}), {"a": split}, {})
    (line,) = describe_skipped(SimpleNamespace(output_dir="run"), whole)
    assert line.startswith("data.on_error: 3 of 7 rows of train are skipped, 1 more lose an answer, see run/")
    assert split.ends.tolist() == [3, 4, 5, 6]
    assert split.examples.where(5).endswith("line 6")
    with pytest.raises(UserError, match="line 5: "):
        build_split(data_of(tmp_path, rows), encoding, which="train")


def test_a_validation_row_that_is_skipped_has_no_references(tmp_path, encoding):
    data = data_of(tmp_path, [ROWS[0], {"q": None, "refs": ["x"]}, ROWS[1]], on_error="skip")
    split = build_split(data, encoding, which="validation")
    assert build_references(data, split.rows) == [["one", "two", "three"], ["four"]]


@pytest.mark.parametrize("target", [" {{ refs }}", " {{ q }}"])
def test_a_row_whose_references_cannot_be_used_is_skipped_where_metrics_read_them(tmp_path, encoding, target):
    data = data_of(tmp_path, [ROWS[0], {"q": "x", "refs": ["x", None]}, ROWS[1]], target=target, on_error="skip")
    split = build_split(data, encoding, which="validation")
    assert build_references(data, split.rows) == [["one", "two", "three"], ["four"]]
    assert lines_of(split.skipped.whole) == ["2"] and len(split.examples) == 2


def test_rows_of_which_none_can_be_used_are_one_line(tmp_path, encoding):
    data = data_of(tmp_path, [{"q": None, "refs": "x"}, {"q": None, "refs": "y"}], on_error="skip")
    with pytest.raises(UserError, match=r"^data.on_error: no row of .* can be used: .* line 1: column 'q'[^\n]*$"):
        build_split(data, encoding, which="train")
