"""Words on the command line that are no argument are told what to write instead, in one line and with status 2."""

import pytest

from ptune_dist.cli import main
from ptune_dist.command_line.arguments import parse
from tests.config.test_config import SMALL


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(SMALL)
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize(
    "line, says",
    [
        ("trian my.yaml", "unknown command trian: did you mean train?"),
        ("my.yaml", "unknown command my.yaml: a command stands before the config: ptune-dist train my.yaml"),
        ("my.yaml train", "a command stands before the config"),
        ("help", "write ptune-dist --help"),
        ("--versoin", "unknown option --versoin: did you mean --version?"),
        ("train", "CONFIG is missing, a YAML file"),
        ("evaluate", "RUN is missing, the folder of a run"),
        ("bench", "MATRIX is missing"),
        ("train --config my.yaml", "--config: the config is given by its name alone: ptune-dist train my.yaml"),
        ("validate -c my.yaml", "-c: the config is given by its name alone: ptune-dist validate my.yaml"),
        ("train my.yaml other.yaml", "other.yaml: one config at a time"),
        ("train my.yaml --train.max_steps 5", "--train.max_steps: write train.max_steps=5, without dashes and spaces"),
        ("train --train.max_steps 5 my.yaml", "--train.max_steps: write train.max_steps=VALUE"),
        ("train my.yaml train.max_steps = 5", "train.max_steps: write train.max_steps=5, without dashes and spaces"),
        ("train my.yaml train.max_steps: 5", "write train.max_steps=5, without dashes and spaces"),
        ("train my.yaml --max-steps=5", "--max-steps=5: write train.max_steps=5, without dashes and spaces"),
        ("train my.yaml --frobnicate", "unrecognized arguments: --frobnicate"),
        ("train my.yaml 5", "'5' is not key.path=value"),
        ("train folder", "folder: a folder, and a config is a YAML file"),
        ("train rows.jsonl", "rows.jsonl: rows, and no config: a YAML file names them in data.train"),
        ("evaluate my.yaml", "my.yaml: a file: give the folder of a run"),
        ("evaluate runs/nope", "runs/nope: there is no such folder"),
        ("export run runs/nope --to model --out out", "runs/nope: there is no such folder of a run, and it is not key"),
        ("import-base nope.gguf --out out", "nope.gguf: there is no such file"),
        ("env x", "unrecognized arguments: x"),
    ],
)
def test_a_word_that_is_no_argument_is_told_what_to_write(folder, capsys, line, says):
    assert main(line.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert says in printed


@pytest.mark.parametrize(
    "line",
    [
        "train my.yaml train.max_steps=5 seed=2",
        "train train.max_steps=5 my.yaml seed=2",
        "train --train.max_steps=5 --seed=2 my.yaml",
        "train train.max_steps=5 seed=2 my.yaml",
    ],
)
def test_overrides_stand_before_or_behind_the_config_in_their_order(line):
    parsed = parse(line.split())
    assert (parsed.config, parsed.overrides) == ("my.yaml", ["train.max_steps=5", "seed=2"])


def test_a_value_of_an_option_is_no_override():
    parsed = parse(["generate", "run", "--input", "train.max_steps=5", "evaluate.max_new_tokens=3"])
    assert (parsed.input, parsed.overrides) == ("train.max_steps=5", ["evaluate.max_new_tokens=3"])
