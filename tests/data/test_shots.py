"""Examples in the prompt: drawn from the training rows by a seed, some of each label, and written as rows are."""

import json

import pytest

from ptune_dist.config.prompt_text import TextConfig
from ptune_dist.config.schema import DataConfig
from ptune_dist.data import token_cache
from ptune_dist.data.build import build_split
from ptune_dist.data.shots import draw_shots, write_shots, write_turns
from ptune_dist.tiny.make import build_tokenizer
from tests.data.texts import encoding_of

TOKENIZER = build_tokenizer()


@pytest.fixture
def draw(tmp_path):
    """The examples that are drawn from some rows."""

    def draw_from(rows: list[dict], count: int, seed: int = 0, which: str = "train", **options):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"template": "<{{ text }}>", "target": " {{ label }}"} | options
        data = DataConfig(train=str(tmp_path / "a.jsonl"), **given)
        encoding = encoding_of(TOKENIZER, around=TextConfig(output="O:").around())
        split = build_split(data, encoding, which=which)
        assert split is not None
        return draw_shots(data, split, encoding, count, seed)

    return draw_from


ROWS = [{"text": f"t{i}", "label": "yes" if i < 18 else "no"} for i in range(20)]


def test_examples_are_training_rows_as_they_are_written_and_follow_the_seed(draw):
    found = draw(ROWS, 4)
    assert len(set(found)) == 4
    known = {(f"<{row['text']}>\nO:", f" {row['label']}") for row in ROWS}
    assert set(found) <= known
    assert draw(ROWS, 4) == found
    assert draw(ROWS, 4, seed=1) != found


def test_rows_whose_tokens_are_on_disk_give_the_same_examples(draw, monkeypatch, tmp_path):
    expected = draw(ROWS, 4)
    monkeypatch.setattr(token_cache, "SMALLEST_BYTES", 1)
    built, found = [draw(ROWS, 4, cache_dir=str(tmp_path / "cache")) for _ in range(2)]
    assert any((tmp_path / "cache").iterdir())
    assert built == found == expected


def test_labels_have_as_many_examples_each_as_their_rows_allow(draw):
    of_four = [label for _, label in draw(ROWS, 4, labels=["yes", "no"])]
    assert sorted(of_four) == [" no", " no", " yes", " yes"]
    of_six = [label for _, label in draw(ROWS, 6, labels=["yes", "no"])]
    assert sorted(of_six) == [" no"] * 2 + [" yes"] * 4


def test_rows_that_validate_are_no_examples(draw):
    for seed in range(5):
        found = {text for text, _ in draw(ROWS, 10, seed=seed, validation=0.5)}
        held = {text for text, _ in draw(ROWS, 10, seed=seed, which="validation", validation=0.5)}
        assert len(found) == len(held) == 10 and not found & held


def test_of_several_answers_the_first_is_shown_and_few_rows_are_all(draw):
    rows = [{"text": f"t{i}", "answers": [f"{i}a", f"{i}b"]} for i in range(3)]
    found = draw(rows, 4, target=" {{ answers }}", references="answers")
    assert sorted(found) == [(f"<t{i}>\nO:", f" {i}a") for i in range(3)]


def test_examples_stand_apart_after_the_task():
    shots = [("a:", " A\n"), ("b:", " B")]
    assert write_shots(shots, "Task.", on_new_line=False) == "Task.\n\na: A\n\nb: B\n\n"
    assert write_shots(shots[1:], "", on_new_line=True) == "b:\nB\n\n"
    assert write_turns(shots, "Task.") == (("Task.\na:", "A"), ("b:", "B"))
