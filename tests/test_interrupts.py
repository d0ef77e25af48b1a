"""Ctrl-C and TERM at random moments, and the speed of what needs no torch."""

import resource
import shutil
import subprocess
import sys

import pytest

from tests.interrupts import cpu_seconds, find_faults
from tests.launcher.nodes import RUN, build_env
from tests.processes import ROOT, command_line, process_env


@pytest.mark.long
def test_interrupts_while_starting():
    assert find_faults(12, seed=1, longest_s=1.5) == []


@pytest.mark.extended
def test_interrupts_at_any_moment():
    assert find_faults(200, seed=2, longest_s=8.0, with_run=True) == []


@pytest.mark.parametrize("command", ["train", "validate", "evaluate", "generate", "export"])
def test_the_first_line_comes_within_a_second_and_before_torch(tmp_path, command):
    """A torch that ends the process at once shows what comes before it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os; os._exit(7)\n")
    run = tmp_path / "run"
    (run / "prompt").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "quickstart.yaml", run / "config.yaml")
    more = {"generate": ["--input", "x"], "export": ["--to", "peft", "--out", tmp_path / "out"]}.get(command, [])
    what = ROOT / "configs" / "quickstart.yaml" if command in ("train", "validate") else run
    env = process_env() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command_line("ptune_dist", command, what, *more), cwd=ROOT, env=env, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 7, done.stderr
    assert f"{command} {what}, importing torch" in done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_launchers_first_line_comes_within_a_second(tmp_path):
    process = subprocess.Popen(
        [RUN, str(ROOT / "configs" / "quickstart.yaml"), f"output_dir={tmp_path}/run"],
        env=build_env({"PTUNE_PROCS": 2}),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    seconds = cpu_seconds(process.pid)
    process.terminate()
    process.communicate(timeout=60)
    assert first.startswith("launcher: train ") and first.endswith("importing torch ...\n")
    assert seconds < 1.0


def test_help_imports_no_config():
    code = "import sys, ptune_dist.cli; print(sorted({'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=process_env(), capture_output=True, text=True)
    assert done.stdout == "[]\n"
