"""launch/wheelhouse.sh: what nodes without a network need.

PTUNE_TEST_WHEELHOUSE=1 adds an install and a training run in a network namespace without a link, which needs root.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, process_env


def wheelhouse(*arguments: str, **settings: str) -> subprocess.CompletedProcess:
    env = process_env({"PTUNE_PYTHON": sys.executable} | settings)
    command = ["bash", "launch/wheelhouse.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "usage: launch/wheelhouse.sh"),
        (["DIR", "OTHER"], "expected one directory, not two"),
        (["--wheels", "DIR"], "unknown option --wheels"),
        (["DIR", "--base"], "--base needs a value"),
        (["--base", "docs", "DIR"], "docs: not a model: it has no config.json"),
        (
            ["--extra", "tset", "DIR"],
            "--extra tset: pyproject.toml has bench, docs, gguf, zst, metrics, ",
        ),
        (["--base", "gpt2", "DIR"], "--base gpt2: https://huggingface.co cannot be reached"),
        (["--data", "glue@sst2", "DIR"], "--data glue@sst2: https://huggingface.co cannot be reached"),
        (["A DIR"], "pip does not accept a directory with a space"),
    ],
)
def test_wheelhouse_says_a_mistake_in_one_line(arguments, said, tmp_path):
    arguments = [str(tmp_path / word) if word in ("DIR", "OTHER", "A DIR") else word for word in arguments]
    done = wheelhouse(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "DIR" / "wheels").exists()


@pytest.mark.parametrize(
    "cuda, wheels",
    [
        ("12.6", "--extra-index-url=https://download.pytorch.org/whl/cu126 setuptools>=77 pip wheel "),
        ("13.0", "setuptools>=77 pip wheel "),
    ],
)
def test_wheelhouse_has_the_build_of_torch_that_ptune_cuda_names(cuda: str, wheels: str, tmp_path: Path):
    python = tmp_path / "python"  # a pip that only records what it is asked for
    script = f'case "$*" in "-m pip "*) shift 2; echo "$@" >>{tmp_path}/pip.log;; *) exec {sys.executable} "$@";; esac'
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = wheelhouse(str(tmp_path / "house"), PTUNE_PYTHON=str(python), PTUNE_CUDA=cuda)
    assert done.returncode == 0, done.stderr
    wheel, install = (tmp_path / "pip.log").read_text().splitlines()
    assert f"--wheel-dir {tmp_path}/house/wheels {wheels}" in wheel
    for line in (wheel, install):
        assert line.endswith(" torch==2.13.0+cu126" if cuda == "12.6" else " torch")


def test_wheelhouse_refuses_a_wrong_ptune_cuda_in_one_line(tmp_path: Path):
    done = wheelhouse(str(tmp_path / "house"), PTUNE_CUDA="11")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: PTUNE_CUDA=11: PyTorch 2.13.0")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "house").exists()


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("PTUNE_TEST_WHEELHOUSE"), reason="PTUNE_TEST_WHEELHOUSE=1: minutes, root")
def test_wheelhouse_is_all_that_a_node_without_a_network_needs(tmp_path):
    filled = wheelhouse("--base", str(ROOT / "configs" / "tiny" / "causal"), str(tmp_path / "house"))
    assert filled.returncode == 0, filled.stderr[-2000:]
    lines = filled.stdout.rstrip().splitlines()[-3:]
    clone = tmp_path / "clone"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    script = "\n".join([
        "set -e; ip link set lo up; if ip -oneline link | grep -qv ' lo: '; then echo a link; exit 1; fi", *lines,
        f"bash launch/quickstart.sh train.max_steps=5 model.path={tmp_path}/house/bases/causal",
    ])  # fmt: skip
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": str(Path(sys.executable).resolve()), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script], cwd=clone, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert ", 5 steps, " in done.stdout
