"""What a server that knows nothing of this package answers with an exported folder is what `generate` answers."""

import json
from pathlib import Path

import pytest

from tests.commands import run_commands, run_module
from tests.conftest import TINY
from tests.numerics.methods import write_run
from tests.numerics.test_curves import train_all
from tests.numerics.test_families import write_rows

SERVER = str(Path(__file__).with_name("serve.py"))
WORDS = ["a", "held", "adaptive", "of", "prompting"]
TRAIN = {"train": {"max_steps": 3}}


@pytest.mark.long
def test_a_server_answers_as_generate_does(tiny_bases, tmp_path):
    asked = write_rows(tmp_path / "asked.jsonl", [{"word": word} for word in WORDS])
    specs = [
        write_run(tmp_path, "tiny", TINY / "causal", {}, **TRAIN),
        write_run(tmp_path, "infix", TINY / "causal", {"placement": "infix"}, **TRAIN),
        write_run(tmp_path, "t5", tiny_bases["t5"], {}, **TRAIN),
    ]
    runs = train_all(specs, tmp_path, num_ranks=1)
    commands = []
    requests = []
    for name, run in runs.items():
        folder = tmp_path / "models" / name
        commands.append(["export", str(run), "--to", "model", "--out", str(folder)])
        output = ["--output", str(tmp_path / f"{name}.jsonl"), "--max-new-tokens", "8"]
        commands.append(["generate", str(run), "--input-file", str(asked), *output])
        requests.append({"model": str(folder), "texts": [f"{word} =" for word in WORDS], "new_tokens": 8})
    both = [str(runs["tiny"]), str(runs["infix"]), "--names", "first,last", "--to", "model"]
    commands.append(["export", *both, "--out", str(tmp_path / "both")])
    for text in ("<|first|>{} =", "{} =<|last|>"):
        requests.append({"model": str(tmp_path / "both"), "texts": [text.format(w) for w in WORDS], "new_tokens": 8})
    run_commands(commands)
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    done = run_module(SERVER, str(tmp_path / "requests.jsonl"), str(tmp_path / "answers.jsonl"), fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for name, answers in zip([*runs, "tiny", "infix"], found, strict=True):
        wanted = [json.loads(line)["generated"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert answers == wanted, name
        assert len(set(answers)) > 1, name
