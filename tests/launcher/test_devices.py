"""GPUs that a node promises and torch does not see: no rank may silently train on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptune_dist.cluster.devices import count_gpus, describe_missing_gpus
from tests.conftest import write_config
from tests.launcher.nodes import Nodes, only_line
from tests.launcher.test_torch_builds import RECORDED, write_nvidia_smi
from tests.processes import process_env

LISTED = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA H100\n"


def write_listing(folder: Path, query: str) -> str:
    """An nvidia-smi that lists two GPUs and answers a query; returns the PATH that has it."""
    write_nvidia_smi(folder, query)
    (folder / "nvidia-smi").rename(folder / "query")
    (folder / "nvidia-smi").write_text(
        f"#!/bin/sh\n[ $1 != -L ] && exec {folder}/query \"$@\"\ncat <<'END'\n{LISTED}END\n"
    )
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("visible", "number"), [("0,1,2", 3), ("", 0), ("-1", 0), ("GPU-8a,GPU-8b", 2), ("MIG-GPU-1/2/3", 1)]
)
def test_the_visible_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, visible: str, number: int):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == number


def test_nvidia_smi_counts_the_gpus_and_without_it_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus() == 0
    monkeypatch.setenv("PATH", write_listing(tmp_path, RECORDED["H200, driver 580"]) + ":/bin")
    assert count_gpus() == 2


@pytest.mark.parametrize(
    ("driver", "cuda", "message"),
    [
        (
            "8 H100, driver 550",
            "13.0",
            "8 GPUs, but NVIDIA driver 550.54.15 is too old for torch 2.13.0+cu130, which is built for CUDA 13.0 and"
            " needs 580.65 or newer: run launch/setup.sh on such a node, or PTUNE_CUDA=12.6 bash launch/setup.sh "
            "anywhere (CUDA_VISIBLE_DEVICES= trains on the CPU)",
        ),
        (
            "A100, driver 470",
            "12.6",
            "NVIDIA driver 470.223.02 is too old for torch 2.13.0+cu126, which is built for CUD",
        ),
        (
            "A100, driver 470",
            "12.6",
            "needs 525.60 or newer: update the driver (CUDA_VISIBLE_DEVICES= trains on the CPU)",
        ),
        (
            "H200, driver 580",
            None,
            "torch 2.13.0+cpu is built without CUDA (the node has NVIDIA driver 580.95.05): run ",
        ),
        (
            "H200, driver 580",
            "13.0",
            "torch 2.13.0+cu130, which is built for CUDA 13.0, sees none of them with NVIDIA driv",
        ),
        (
            "",
            None,
            "torch 2.13.0+cpu is built without CUDA (the node has an unknown NVIDIA driver): run launch/setup.sh",
        ),
    ],
)
def test_the_driver_the_build_and_the_remedy_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, cuda: str | None, message: str
):
    write_nvidia_smi(tmp_path, RECORDED.get(driver, ""))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    version = f"2.13.0+cu{cuda.replace('.', '')}" if cuda else "2.13.0+cpu"
    found = describe_missing_gpus(8, version, cuda)
    assert message in found and "\n" not in found


INIT = """
from ptune_dist.distributed.world import find_device
from ptune_dist.errors import NodeFault
import os, torch
for env in ({"CUDA_VISIBLE_DEVICES": ""}, {"PTUNE_NUM_GPUS": "0"}, {"PTUNE_NUM_GPUS": "2"}, {}):
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ.pop("PTUNE_NUM_GPUS", None)
    os.environ.update(env)
    try:
        print(find_device())
    except NodeFault as fault:
        print(fault.node, fault)
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
os.environ.update(LOCAL_RANK="2", LOCAL_WORLD_SIZE="4")
try:
    find_device()
except NodeFault as fault:
    print(fault)
"""


def test_a_rank_ends_if_torch_does_not_see_what_was_promised_unless_the_user_hides_it(tmp_path: Path):
    """With a launcher, and without one."""
    path = write_listing(tmp_path, RECORDED["8 H100, driver 550"])
    env = process_env({"PATH": path, "PTUNE_NODE_NAME": "n7"})
    done = subprocess.run([sys.executable, "-c", INIT], env=env, capture_output=True, text=True, check=True)
    hidden, none, promised, alone, too_many = done.stdout.splitlines()
    assert hidden == none == "cpu"
    assert promised.startswith("n7 node n7 has 2 GPUs, but torch 2.13") and "NVIDIA driver 550.54.15" in promised
    assert alone == promised
    assert too_many == "node n7 has 2 GPUs for 4 ranks: set PTUNE_PROCS=2"


@pytest.mark.long
def test_a_job_on_gpus_that_torch_does_not_see_ends_in_one_line_and_is_not_restarted(tmp_path: Path):
    env = {
        "PATH": write_listing(tmp_path, RECORDED["8 H100, driver 550"]),
        "CUDA_VISIBLE_DEVICES": None,
        "PTUNE_PROCS": None,
    }
    nodes = Nodes(tmp_path, write_config(tmp_path / "c.yaml"), names="a", **env)
    assert nodes.wait() == [1], nodes.output
    assert only_line(nodes).startswith("launcher: fault: node a has 2 GPUs, but torch 2.13")
    assert (nodes.status["kind"], nodes.status["node"], nodes.status["restarts"]) == ("fault", "a", 0)
