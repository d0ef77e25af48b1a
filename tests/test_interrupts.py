"""Ctrl-C and TERM at random moments, and the speed of what needs no torch."""

import subprocess
import sys

import pytest

from tests.interrupts import find_faults
from tests.processes import ROOT, process_env


def test_interrupts_while_starting():
    assert find_faults(20, seed=1, longest_s=1.5) == []


@pytest.mark.extended
def test_interrupts_at_any_moment():
    assert find_faults(200, seed=2, longest_s=15.0) == []


def test_help_imports_no_config():
    code = "import sys, ptune_dist.cli; print(sorted({'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=process_env(), capture_output=True, text=True)
    assert done.stdout == "[]\n"
