"""Which rank is blamed for a hang, from the stacks of all threads.

`stacks/` has stacks in faulthandler's format as a rank on a GPU writes them: files, functions and lines are those of
torch 2.13 and DeepSpeed 0.19.8. On a GPU, backward runs in a thread of autograd's.
"""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptune_dist.cluster.stacks import FRAME, find_busy_place
from tests.processes import ROOT

RECORDED = Path(__file__).parent / "stacks"
INSTALLED = "/venv/lib/python3.11/site-packages/"

ON_CPU = """Fatal Python error: Aborted

Thread 0x00007f507ffff6c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Current thread 0x00007fb6a5fcab80 (most recent call first):
  File "{file}", line 18 in {function}
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 4287 in all_gather
  File "/repository/ptune_dist/loop.py", line 121 in run_steps
"""


@pytest.mark.parametrize(
    ("file", "function", "place"),
    [
        ("/home/me/plugin.py", "sleep_forever", "sleep_forever (plugin.py, line 18)"),
        ("/venv/lib/python3.11/site-packages/torch/nn/functional.py", "linear", "linear (functional.py, line 18)"),
        ("/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", "all_reduce", ""),
        ("/repository/ptune_dist/distributed/world.py", "sum_over_ranks", ""),
    ],
)
def test_on_a_cpu_a_waiting_rank_is_told_from_a_busy_one(file: str, function: str, place: str):
    assert find_busy_place(ON_CPU.format(file=file, function=function), on_gpu=False) == place


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("backward", ""),  # autograd's thread launches kernels
        ("backward_gathers", ""),
        ("recomputation", ""),
        ("backward_in_a_hook", "clip_by_disk (plugin.py, line 18)"),
        ("reads_a_sum", ""),
        ("clips_gradients", ""),
        ("synchronizes", ""),
        ("launches_a_kernel", ""),
        ("reads_rows", "_load_file (sources.py, line 90)"),
        ("next_batch_from_a_disk", "_load_file (sources.py, line 90)"),
        ("next_batch_on_the_gpu", ""),
    ],
)
def test_on_a_gpu_all_threads_are_judged(name: str, place: str):
    assert find_busy_place((RECORDED / f"{name}.txt").read_text(), on_gpu=True) == place


def test_every_recorded_stack_is_that_of_installed_code():
    """Names, not lines: a new release moves these."""
    checked = 0
    for path in RECORDED.glob("*.txt"):
        for file, _, function in FRAME.findall(path.read_text()):
            package = file.removeprefix(INSTALLED).partition("/")[0]
            if not file.startswith(INSTALLED) or find_spec(package) is None:
                continue
            source = Path(str(find_spec(package).origin)).parent.parent / file.removeprefix(INSTALLED)
            names = {node.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)}
            assert function in names, f"{path.name}: {source} has no {function}"
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("total = loss.item()", True),
        ("numbers = losses.double().tolist()", True),
        ("if bool(finite.all()):", True),
        ("rows = batch.to(device)", True),
        ("time.sleep(10)", False),
        ("rows = read(file)", False),
    ],
)
def test_on_a_gpu_a_line_that_reads_a_result_of_the_gpu_waits_for_it(tmp_path: Path, line: str, waits: bool):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("\n" * 17 + line + "\n")
    stacks = f'Current thread 0x1 (most recent call first):\n  File "{plugin}", line 18 in step\n'
    assert find_busy_place(stacks, on_gpu=True) == ("" if waits else "step (plugin.py, line 18)")
    assert find_busy_place(stacks, on_gpu=False) == "step (plugin.py, line 18)"  # on a CPU nothing is behind it


@pytest.mark.parametrize("text", ["", "Fatal Python error: Segmentation fault\n", "Current thread 0x1"])
def test_without_a_stack_no_place_is_found(text: str):
    assert find_busy_place(text, on_gpu=False) == find_busy_place(text, on_gpu=True) == ""


def test_the_output_of_the_real_fault_handler_is_understood(tmp_path: Path):
    """The main thread waits for a thread of its own, which is the busy one."""
    script = """
import faulthandler, os, signal, threading, time
faulthandler.register(signal.SIGQUIT, open("stacks.txt", "w"))
def busy():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGQUIT)
    time.sleep(0.3)
worker = threading.Thread(target=busy)
worker.start()
worker.join()
"""
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "Current thread" in stacks and "in _bootstrap" in stacks
    assert find_busy_place(stacks, on_gpu=False).startswith("busy (script.py, line ")


def test_the_package_has_no_other_code_that_runs_kernels():
    """Every package that imports torch is known as code whose operations may wait for the GPU."""
    from ptune_dist.cluster.stacks import KERNEL_CODE, WAITING_CODE

    for path in (ROOT / "ptune_dist").rglob("*.py"):
        parts = path.relative_to(ROOT / "ptune_dist").parts
        if "import torch" in path.read_text() and parts[0] not in ("bench", "tiny", "data", "cluster", "run", "export"):
            name = f"/repository/ptune_dist/{'/'.join(parts)}"
            known = KERNEL_CODE.search(name) or any(code in name for code in WAITING_CODE)
            assert known or parts[0] in ("api", "cli.py", "command_line", "commands.py"), name
