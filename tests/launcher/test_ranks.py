"""What a launcher learns about its ranks from outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptune_dist.cluster.processes import process_state
from ptune_dist.cluster.rank_monitor import find_busy_place
from ptune_dist.cluster.ranks import copy_lines, to_file_name, wait_until_written

STACKS = """Fatal Python error: Aborted

Thread 0x00007f507ffff6c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Current thread 0x00007fb6a5fcab80 (most recent call first):
  File "{file}", line 18 in {function}
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 4287 in all_gather
  File "/repository/ptune_dist/train.py", line 121 in run_steps
"""


@pytest.mark.parametrize(
    ("file", "function", "place"),
    [
        ("/home/me/plugin.py", "sleep_forever", "sleep_forever (plugin.py, line 18)"),
        ("/venv/lib/python3.11/site-packages/torch/nn/functional.py", "linear", "linear (functional.py, line 18)"),
        ("/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", "all_reduce", ""),
        ("/repository/ptune_dist/distributed/world.py", "sum_over_ranks", ""),  # .tolist() of what NCCL still reduces
    ],
)
def test_a_waiting_rank_is_told_from_a_busy_one(file: str, function: str, place: str):
    assert find_busy_place(STACKS.format(file=file, function=function)) == place


@pytest.mark.parametrize("text", ["", "Fatal Python error: Segmentation fault\n", "Current thread 0x1"])
def test_without_a_stack_no_place_is_found(text: str):
    assert find_busy_place(text) == ""


def test_the_output_of_the_real_fault_handler_is_understood(tmp_path: Path):
    script = (
        "import faulthandler, os\ndef busy():\n    os.abort()\nfaulthandler.enable(open('stack.txt', 'w'))\nbusy()\n"
    )
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path)
    assert find_busy_place((tmp_path / "stack.txt").read_text()) == "busy (script.py, line 3)"


def test_the_state_of_a_process():
    assert process_state(os.getpid()) == "R"
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(ended.pid) == "Z"
    ended.wait()
    assert process_state(ended.pid) == ""


def test_a_failing_sink_does_not_stop_the_others(tmp_path: Path):
    broken = open(tmp_path / "broken", "wb")
    broken.close()
    (tmp_path / "source").write_bytes(b"one\ntwo")
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "log", "wb", buffering=0) as log:
        copy_lines(source, broken, log)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo"


def test_files_are_waited_for_until_they_are_written(tmp_path: Path):
    file = tmp_path / "rank-00000.txt"
    file.touch()
    writer = subprocess.Popen(["sh", "-c", f"sleep 0.3; echo stack > {file}"])
    wait_until_written([file], seconds=10)
    assert file.read_text() == "stack\n"
    writer.wait()


@pytest.mark.parametrize(
    ("name", "file"), [("n-1.site", "n-1.site"), ("2 (ip-10-0-0-21)", "2-ip-10-0-0-21"), ("a/b", "a-b")]
)
def test_a_nodes_name_becomes_a_file_name(name: str, file: str):
    assert to_file_name(name) == file
