"""What a launcher reads from outside of its ranks."""

import os
import subprocess
import sys

import pytest

from ptune_dist.cluster.ranks import busy_place, copy_lines, make_folder, slug, state_of

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
def test_a_rank_that_waits_for_others_is_told_from_one_that_is_busy(file, function, place):
    assert busy_place(STACKS.format(file=file, function=function)) == place


@pytest.mark.parametrize("text", ["", "Fatal Python error: Segmentation fault\n", "Current thread 0x1"])
def test_no_stack_says_nothing(text):
    assert busy_place(text) == ""


def test_what_the_fault_handler_really_writes_is_understood(tmp_path):
    script = (
        "import faulthandler, os\ndef busy():\n    os.abort()\nfaulthandler.enable(open('stack.txt', 'w'))\nbusy()\n"
    )
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path)
    assert busy_place((tmp_path / "stack.txt").read_text()) == "busy (script.py, line 3)"


def test_the_state_of_a_process():
    assert state_of(os.getpid()) == "R"
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert state_of(ended.pid) == "Z"
    ended.wait()
    assert state_of(ended.pid) == ""


def test_a_sink_that_fails_does_not_stop_the_others(tmp_path):
    broken = open(tmp_path / "broken", "wb")
    broken.close()
    (tmp_path / "source").write_bytes(b"one\ntwo")
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "log", "wb", buffering=0) as log:
        copy_lines(source, broken, log)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo"


def test_the_folders_of_killed_launchers_are_removed_and_those_of_living_ones_stay(tmp_path):
    killed, claim = make_folder(tmp_path)
    (killed / "rank-00000.beat").touch()
    claim.close()  # as the kernel does
    living, claim = make_folder(tmp_path)
    assert not killed.exists()
    own, own_claim = make_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, own])
    claim.close(), own_claim.close()


@pytest.mark.parametrize(
    ("name", "file"), [("n-1.site", "n-1.site"), ("2 (ip-10-0-0-21)", "2-ip-10-0-0-21"), ("a/b", "a-b")]
)
def test_a_node_s_name_makes_a_files_name(name, file):
    assert slug(name) == file
