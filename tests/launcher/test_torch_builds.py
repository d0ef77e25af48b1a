"""Which of PyTorch's builds is installed, from what nvidia-smi prints and from PTUNE_CUDA."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPT = ROOT / "ptune_dist" / "cluster" / "torch_builds.py"
INDEX = "--extra-index-url=https://download.pytorch.org/whl"
CU126 = ["torch==2.13.0+cu126", f"{INDEX}/cu126"]
CU130 = ["torch==2.13.0+cu130", f"{INDEX}/cu130"]
DEFAULT = ["torch"] if platform.machine() == "x86_64" else CU130

# nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader
RECORDED = {
    "8 H100, driver 550": "550.54.15, 9.0\n" * 8,
    "A100, driver 525": "525.147.05, 8.0\n",
    "H200, driver 580": "580.95.05, 9.0\n",
    "B200, driver 590": "590.44.01, 10.0\n" * 2,
    "V100, driver 580": "580.95.05, 7.0\n",
    "T4, driver 535": "535.183.01, 7.5\n",
    "B200, driver 570": "570.133.20, 10.0\n",
    "A100, driver 470": "470.223.02, 8.0\n",
    "K80, driver 525": "525.147.05, 3.7\n",
}
FAILED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
)


def write_nvidia_smi(folder: Path, printed: str, *, status: int = 0, knows_capability: bool = True) -> None:
    """An nvidia-smi that prints what a real one has printed."""
    refusal = "" if knows_capability else 'case "$*" in *compute_cap*) echo "Field not valid"; exit 2;; esac\n'
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{refusal}cat <<'END'\n{printed}END\nexit {status}\n")
    (folder / "nvidia-smi").chmod(0o755)


def choose(folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run the file as launch/setup.sh does, without anything installed."""
    env = {"PATH": f"{folder}:/usr/bin:/bin"} | env
    return subprocess.run([sys.executable, "-I", "-S", SCRIPT, "2.13.0"], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        (
            "8 H100, driver 550",
            CU126,
            "PyTorch for CUDA 12.6, which fits NVIDIA driver 550.54.15 and GPUs of compute cap",
        ),
        ("A100, driver 525", CU126, "PyTorch for CUDA 12.6, which fits NVIDIA driver 525.147.05"),
        ("T4, driver 535", CU126, "PyTorch for CUDA 12.6, "),
        ("H200, driver 580", DEFAULT, "PyTorch for CUDA 13.0, which fits NVIDIA driver 580.95.05"),
        ("B200, driver 590", DEFAULT, "PyTorch for CUDA 13.0, which fits NVIDIA driver 590.44.01"),
        (
            "V100, driver 580",
            CU126,
            "PyTorch for CUDA 12.6, which fits NVIDIA driver 580.95.05 and GPUs of compute capa",
        ),
    ],
)
def test_the_build_fits_the_driver_and_the_gpus(tmp_path: Path, name: str, arguments: list[str], reason: str):
    write_nvidia_smi(tmp_path, RECORDED[name])
    done = choose(tmp_path)
    first, *found = done.stdout.splitlines()
    assert (done.returncode, found, done.stderr) == (0, arguments, "") and first.startswith(f"# {reason}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "A100, driver 470",
            "error: NVIDIA driver 470.223.02 is too old for every build of PyTorch: that for CUDA 12.6 needs 525.60 or "
            "newer: update the driver, or set PTUNE_CUDA",
        ),
        (
            "B200, driver 570",
            "error: no build of PyTorch for NVIDIA driver 570.133.20 supports compute capability 10.0: ",
        ),
        (
            "K80, driver 525",
            "error: no build of PyTorch for NVIDIA driver 525.147.05 supports compute capability 3.7: ",
        ),
    ],
)
def test_if_none_fits_one_line_says_why(tmp_path: Path, name: str, message: str):
    write_nvidia_smi(tmp_path, RECORDED[name])
    done = choose(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_an_old_nvidia_smi_that_knows_no_compute_capability_tells_the_driver(tmp_path: Path):
    write_nvidia_smi(tmp_path, "535.183.01\n", knows_capability=False)
    assert choose(tmp_path).stdout.splitlines()[1:] == CU126


def test_without_a_driver_any_build_will_do(tmp_path: Path):
    for _ in ("no nvidia-smi", "one that fails"):
        done = choose(tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        write_nvidia_smi(tmp_path, FAILED, status=9)


@pytest.mark.parametrize(
    ("cuda", "arguments"),
    [
        ("12.6", CU126),
        ("13.0", DEFAULT),
        ("13.2", ["torch==2.13.0+cu132", f"{INDEX}/cu132"]),
        ("cpu", ["torch==2.13.0+cpu", f"{INDEX}/cpu"]),
    ],
)
def test_ptune_cuda_wins_over_the_driver(tmp_path: Path, cuda: str, arguments: list[str]):
    write_nvidia_smi(tmp_path, RECORDED["A100, driver 470"])
    done = choose(tmp_path, PTUNE_CUDA=cuda)
    first, *found = done.stdout.splitlines()
    assert found == arguments and first.startswith(f"# PTUNE_CUDA={cuda}: PyTorch ")


def test_a_wrong_ptune_cuda_is_named_with_the_builds(tmp_path: Path):
    done = choose(tmp_path, PTUNE_CUDA="12.8")
    expected = "error: PTUNE_CUDA=12.8: PyTorch 2.13.0 is built for CUDA 12.6, 13.0, 13.2, or cpu\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_with_a_wheelhouse_its_build_is_taken_unless_ptune_cuda_names_one(tmp_path: Path):
    write_nvidia_smi(tmp_path, RECORDED["T4, driver 535"])
    assert choose(tmp_path, PIP_NO_INDEX="1").stdout == ""
    assert choose(tmp_path, PIP_NO_INDEX="1", PTUNE_CUDA="12.6").stdout.splitlines()[1:] == CU126


def test_the_table_is_that_of_the_pinned_torch():
    """Another torch has other builds: https://github.com/pytorch/pytorch/blob/main/RELEASE.md."""
    pinned = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in pinned
    assert "torch 2.13" in SCRIPT.read_text() and os.access(SCRIPT, os.R_OK)
