"""What the README's first screen promises, run as a user runs it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune_dist.tiny.text import is_held_out
from tests.commands import run_module
from tests.conftest import TINY, extended_beyond
from tests.processes import ROOT


def digest_base() -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((TINY / "causal").iterdir())}


FEWER = ["train.max_steps=200", "evaluate.every=0", "evaluate.max_examples=64"]  # the bounds are those of all steps


@pytest.mark.long
@pytest.mark.parametrize("overrides", extended_beyond([FEWER], [FEWER, []]), ids=["fewer steps", "as it is"])
@pytest.mark.skipif(Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(), reason="needs launch/setup.sh's .venv")
def test_quickstart_teaches_the_skill_and_says_where_everything_lies(overrides):
    before, began = digest_base(), time.monotonic()
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", *overrides], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shown = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("run:", "PEFT adapter:")))
    run = ROOT / shown["run"].strip()
    try:
        summary = json.loads((run / "summary.json").read_text())
        assert summary["before"]["exact_match"] <= 0.10
        assert summary["validation"]["exact_match"] >= 0.90
        assert summary["world_size"] == (1 if torch.cuda.device_count() == 1 else 2) and summary["zero_stage"] == 3
        assert len(summary["samples"]) == 5
        assert all(sample["wanted"] in done.stdout for sample in summary["samples"])
        assert (ROOT / shown["PEFT adapter"].strip() / "adapter_model.safetensors").is_file()
        assert any((run / "tensorboard").iterdir())
        assert digest_base() == before
        print(f"quickstart took {time.monotonic() - began:.0f} s")
    finally:
        shutil.rmtree(run)


def test_the_shipped_base_is_small_and_loads_by_the_auto_classes():
    assert sum(file.stat().st_size for file in (TINY / "causal").iterdir()) <= 3_000_000
    base = AutoModelForCausalLM.from_pretrained(TINY / "causal")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "causal")
    text = "Prompt = PROMPT\n é"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.get_vocab().values()) < base.config.vocab_size


@pytest.mark.extended  # the maker of the shipped files, which rarely changes
def test_one_command_makes_base_and_data(tmp_path):
    done = run_module("ptune_dist.tiny.make", "--out", str(tmp_path), "--steps", "2", "--batch-size", "12")
    assert done.returncode == 0, done.stderr[-2000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "causal").num_parameters() > 1_000_000
    train, held_out = (
        [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    )
    assert (len(train), len(held_out)) == (512, 128)
    assert not {row["word"] for row in train} & {row["word"] for row in held_out}
    assert all(row["answer"] == row["word"].upper() and is_held_out(row["word"]) for row in train + held_out)


@pytest.mark.extended
@pytest.mark.skipif(Path(sys.prefix).resolve() != (ROOT / ".venv").resolve(), reason="needs launch/setup.sh's .venv")
def test_a_real_base_comes_from_a_package_and_learns(tmp_path):
    done = subprocess.run(
        ["bash", "launch/real_base.sh", f"output_dir={tmp_path}/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["validation"]["accuracy"] >= 0.9 > summary["before"]["accuracy"]
