"""launch/setup.sh in a copy of the repository, with a pip that only records what it is asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.test_torch_builds import CU126, RECORDED, write_nvidia_smi
from tests.processes import ROOT

NEEDED = ("pyproject.toml", "launch/setup.sh", "launch/constraints.txt", "ptune_dist/cluster/torch_builds.py")
# The interpreter of a .venv, which knows only `-m pip`; the rest it leaves to this one.
PYTHON = """#!/bin/sh
case "$*" in
  "-m pip --version") ;;
  "-m pip "*) shift 2; echo "$@" >>pip.log ;;
  *) exec {python} "$@" ;;
esac
"""


class Clone:
    """A copy of what setup.sh needs, with a .venv."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in NEEDED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)

    def set_up(self, *arguments: str, **env: str) -> str:
        """Run setup.sh; returns what it printed."""
        variables = {"PATH": f"{self.bin}:{os.environ['PATH']}"} | env
        command = ["bash", "launch/setup.sh", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True)
        assert done.returncode in (0, 2), done.stderr
        return done.stdout + done.stderr

    def pip_calls(self) -> list[str]:
        """What pip was asked for since the last call, without the options that are always the same."""
        log = self.folder / "pip.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        always = "--quiet --disable-pip-version-check --no-compile --constraint launch/constraints.txt "
        return [line.replace(always, "") for line in lines]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


CUDA = f"install {' '.join(CU126)}"
BASE = "install --editable ."


def test_without_a_driver_the_install_is_as_before_and_is_done_once(clone: Clone):
    clone.set_up()
    assert clone.pip_calls() == ["install torch", BASE]
    clone.set_up()
    assert clone.pip_calls() == []
    clone.set_up("test")
    assert clone.pip_calls() == ["install torch", "install --editable .[test]"]


def test_the_driver_selects_the_build_and_a_machine_without_one_keeps_it(clone: Clone):
    write_nvidia_smi(clone.bin, RECORDED["8 H100, driver 550"])
    printed = clone.set_up()
    assert "PyTorch for CUDA 12.6, which fits NVIDIA driver 550.54.15" in printed
    assert clone.pip_calls() == ["uninstall --quiet --yes torch", CUDA, BASE]
    assert clone.set_up() == "" and clone.pip_calls() == []
    (clone.bin / "nvidia-smi").unlink()
    assert clone.set_up() == "" and clone.pip_calls() == []
    with open(clone.folder / "launch" / "constraints.txt", "a") as constraints:
        constraints.write("# another version\n")
    clone.set_up()
    assert clone.pip_calls() == [CUDA, BASE]


def test_a_changed_ptune_cuda_is_noticed(clone: Clone):
    clone.set_up()
    clone.pip_calls()
    clone.set_up(PTUNE_CUDA="12.6")
    assert clone.pip_calls() == ["uninstall --quiet --yes torch", CUDA, BASE]
    clone.set_up(PTUNE_CUDA="cpu")
    assert clone.pip_calls()[1].startswith("install torch==2.13.0+cpu --extra-index-url=")
    clone.set_up(PTUNE_CUDA="cpu")
    assert clone.pip_calls() == []


def test_a_dry_run_only_tells(clone: Clone):
    printed = clone.set_up("--dry-run", "test", PTUNE_CUDA="12.6")
    assert clone.set_up("test", "--dry-run", PTUNE_CUDA="12.6") == printed
    first, second = printed.splitlines()
    assert first == "PTUNE_CUDA=12.6: PyTorch for CUDA 12.6"
    assert second.startswith(f"would install {' '.join(CU126)} and .[test] with Python 3.")
    assert clone.pip_calls() == [] and not list((clone.folder / ".venv").glob(".installed-*"))


def test_an_unknown_option_is_no_extra(clone: Clone):
    assert clone.set_up("--dryrun").startswith("error: --dryrun is unknown: usage: launch/setup.sh")
    assert clone.pip_calls() == []


def test_if_no_build_fits_it_ends_in_one_line_and_installs_nothing(clone: Clone):
    write_nvidia_smi(clone.bin, RECORDED["A100, driver 470"])
    printed = clone.set_up()
    assert printed.startswith("error: NVIDIA driver 470.223.02 is too old for every build") and printed.count("\n") == 1
    assert clone.pip_calls() == []
