"""Many members of a sweep answer in one command, each as it does alone."""

import json
from pathlib import Path

import pytest

from tests.commands import Commands, Finished
from tests.conftest import write_config

WORDS = ["hello", "notebook", "winter"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, commands: Commands) -> Path:
    """Members whose templates, and so their inputs, differ too."""
    folder = tmp_path_factory.mktemp("members")
    members = [
        {"train.learning_rate": 0.05},
        {"train.learning_rate": 0.3, "prompt.num_virtual_tokens": 7},
        {"train.learning_rate": 0.1, "data.template": "{{ word }} {{ word }} ="},
    ]
    train = {"max_steps": 3, "batch_size": 4}
    config = write_config(folder / "config.json", sweep=members, train=train, deepspeed="zero3_fp32")
    done = commands.run("train", config)
    assert done.code == 0, done.err
    return folder / "run"


def lines_of(done: Finished) -> list[dict]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_all_members_answer_each_row_as_each_does_alone(sweep, tmp_path, commands: Commands):
    names = sorted(folder.name for folder in (sweep / "members").iterdir())
    assert len(names) == 3
    assert all(name in (sweep / "report.html").read_text() for name in names)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"word": word}) + "\n" for word in WORDS))
    named = tmp_path / "named.jsonl"
    own = [{"word": word, "who": names[place - 1]} for place, word in enumerate(WORDS)]
    named.write_text("".join(json.dumps(row) + "\n" for row in own))
    options = ("--max-new-tokens", 12)
    started = [commands.start("generate", sweep, "--input-file", file, "--member", name, *options) for name in names]
    together = commands.start("generate", sweep, "--input-file", file, "--member", "all", *options)
    chosen = commands.start("generate", sweep, "--input-file", named, "--member-column", "who", *options)
    alone = {name: lines_of(commands.finish(each)) for name, each in zip(names, started, strict=True)}
    found = lines_of(commands.finish(together))
    assert [row["word"] for row in found] == [word for word in WORDS for _ in names]
    for row in found:
        expected = alone[row["member"]][WORDS.index(row["word"])]
        assert row["generated"] == expected["generated"]
    assert len({row["generated"] for row in found}) > len(WORDS)
    for row, line in zip(own, lines_of(commands.finish(chosen)), strict=True):
        expected = alone[row["who"]][WORDS.index(row["word"])]
        assert line == row | {"member": row["who"], "generated": expected["generated"]}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"word": "a", "who": "nobody"}, ["--member-column", "who"], "line 1: who: 'nobody' is none of learning_rate"),
        ({"word": "a"}, ["--member-column", "who"], "--member-column: 'who' is no column of"),
        ({"word": "a"}, ["--member-column", "who", "--member", "x"], "each row names its member: leave --member out"),
        ({"word": "a"}, ["--member", "all", "--labels"], "answers are texts: name one member"),
    ],
)
def test_mistakes_are_one_line(sweep, tmp_path, commands: Commands, row, options, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    done = commands.run("generate", sweep, "--input-file", file, *options)
    assert done.code == 2
    assert message in done.errors[-1] and len(done.errors) == 1
