"""Whatever is written after `ptune-dist`, it is a valid command or ends in one line: never in a traceback."""

import contextlib
import io
import random
from pathlib import Path

import pytest

from ptune_dist.bench.matrix import load_matrix
from ptune_dist.command_line.arguments import FLAGS, parse
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.run.folder import find_member_dir, read_run_config
from ptune_dist.run.resolve import resolve
from tests.config.mutations import VALUES
from tests.config.test_fuzz import run_all
from tests.processes import ROOT

QUICKSTART = str(ROOT / "configs/quickstart.yaml")
RUN = str(ROOT / "tests/old_runs/infix")
SWEEP = str(ROOT / "tests/old_runs/sweep")
OVERRIDES = [
    "train.max_steps=5",
    "data.template={{ text }}\\n",
    "data.labels=[yes, 'no']",
    'data.target=" {{ label }}"',
    "deepspeed=zero3_bf16",
    "sweep.train.learning_rate=[0.1, 0.2]",
    "prompt={num_virtual_tokens: 3}",
    "output_dir=runs/x",
]
COMMANDS = [
    ["train", QUICKSTART, *OVERRIDES[:2]],
    ["validate", QUICKSTART, *OVERRIDES[2:5]],
    ["check", QUICKSTART, OVERRIDES[5]],
    ["evaluate", RUN, "evaluate.metrics=[loss]"],
    ["evaluate", SWEEP, "--member", "prompt.num_virtual_tokens=4"],
    ["generate", RUN, "--input", "a text", "--max-new-tokens", "3", "--temperature", "0.5", "--top-p", "0.9"],
    ["generate", SWEEP, "--input-file", "rows.jsonl", "--output", "out.jsonl", "--labels", "--seed", "1"],
    ["export", RUN, "--to", "peft", "--out", "folder"],
    ["export", RUN, "--to=prompt-embeds", "--out=folder", "--input", "a text"],
    ["bench", str(ROOT / "configs/bench/saving.yaml"), "--out", "folder"],
    ["import-base", "model.gguf", "--out", "folder", "--dtype", "bfloat16"],
    ["env"],
]
# What a shell can pass: no NUL; half a surrogate is a byte that is not UTF-8.
ODD = [value for value in VALUES if "\0" not in value] + [
    *("", " ", "-", "--", "---", "=", "==", "a=", "=a", "a.b=c=d", "'", '"', "\\", "\n", "\udcff", "--help=1", "-x"),
    *("/", ".", "..", "~", "/dev/null", "/proc/self/mem", "no/such/file.yaml", str(ROOT), str(ROOT / "README.md")),
    *("--train.max_steps", "--config", "train:", "max_steps=5", "1e999", "-1", "nan", "٣", "x" * 5000),
]
QUOTES = [*"\"'`“[]{}# \n\t:,%", "{{", "}}", "\\n", "&a", "*a", "!!x"]


def mutate_words(words: list[str], rng: random.Random) -> list[str]:
    """The words after one change: dropped, repeated, moved, misspelled, replaced, or quoted oddly."""
    words = list(words)
    number = rng.randrange(len(words)) if words else 0
    way = rng.randrange(8) if words else 0
    word = words[number] if words else ""
    at = rng.randrange(len(word) + 1)
    if way == 0:
        words.insert(number, rng.choice([*ODD, *OVERRIDES]))
    elif way == 1:
        del words[number]
    elif way == 2:
        words.insert(rng.randrange(len(words) + 1), words.pop(number))
    elif way == 3:
        words[number] = word[:at] + rng.choice("abc-_=. ") + word[at + rng.randint(0, 1) :]
    elif way == 4:
        words[number] = rng.choice(ODD)
    elif way == 5 and "=" in word:
        words[number] = word.partition("=")[0] + "=" + rng.choice(ODD)
    elif way == 6 and "=" in word:
        at = rng.randrange(word.index("=") + 1, len(word) + 1)
        words[number] = word[:at] + rng.choice(QUOTES) + word[at:]
    else:
        words.append(rng.choice(OVERRIDES) if rng.random() < 0.5 else word)
    return words


def check_words(folder, seed: int) -> None:
    rng = random.Random(seed)
    words = COMMANDS[seed % len(COMMANDS)]
    for _ in range(rng.randint(1, 3)):
        words = mutate_words(words, rng)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(words)
    except UserError as error:  # the command writes it without line breaks
        assert 0 < len(str(error)) < 6000, f"{words}: {error}"
    except SystemExit as end:
        assert end.code == 0 and set(words) & set(FLAGS), words


def read(words: list[str]) -> None:
    """What the commands do before they import torch and compute."""
    parsed = parse(words)
    name = parsed.run.__name__.removeprefix("run_")
    if name in ("train", "validate", "check"):
        load_config(parsed.config, parsed.overrides, resolve=resolve)
    elif name in ("evaluate", "generate", "export"):
        run_dir = find_member_dir(Path(parsed.run_dir), parsed.member)
        read_run_config(run_dir, parsed.overrides, resolve=resolve)
    elif name == "bench":
        load_matrix(parsed.matrix)


def test_some_hundred_command_lines_are_valid_or_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_all(check_words, tmp_path, range(300))


def test_command_lines_that_once_failed_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_all(check_words, tmp_path, [3295, 4657, 8058, 8220])  # the name of a run that no file system takes


@pytest.mark.extended
def test_thousands_of_command_lines_are_valid_or_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_all(check_words, tmp_path, range(1000, 11000))
