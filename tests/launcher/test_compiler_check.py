"""What Triton needs on a node with GPUs: a lack is one line that names what to install."""

import sysconfig
from pathlib import Path

import pytest

from ptune_dist.cluster import compiler_check
from ptune_dist.cluster.compiler_check import find_compiler_problem


def write_compiler(folder: Path, script: str) -> str:
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_this_machine_compiles_and_loads_an_extension():
    assert find_compiler_problem() == ""


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo 'x.c:2:10: fatal error: Python.h: No such file or directory' >&2; exit 1",
            f"Triton needs Python's headers, and there is no {sysconfig.get_paths()['include']}/Python.h: install ",
        ),
        (
            "echo 'In file x'; echo 'x.c:1: fatal error: stdio.h: no' >&2; exit 1",
            "fails: x.c:1: fatal error: stdio.h: no",
        ),
        ("exit 1", "fails: it printed nothing: install gcc"),
        ("exit 0", "a C extension that "),  # compiles nothing
        ('while [ "$1" != -o ]; do shift; done; echo no library >"$2"', "cannot be loaded: "),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
):
    monkeypatch.setenv("CC", write_compiler(tmp_path, script))
    found = find_compiler_problem()
    assert problem in found and "\n" not in found


def test_a_compiler_that_is_missing_or_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "/no/such/cc")
    assert find_compiler_problem().startswith("Triton needs a C compiler, and /no/such/cc cannot be run: install gcc")
    monkeypatch.setenv("CC", write_compiler(tmp_path, "exec sleep 5"))
    monkeypatch.setattr(compiler_check, "SECONDS_TO_COMPILE", 0.2)
    assert "takes more than 0.2 s for one line" in find_compiler_problem()


def test_headers_that_are_not_there_are_found_by_the_real_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler_check, "find_headers", lambda: str(tmp_path))
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert find_compiler_problem().startswith(f"Triton needs Python's headers, and there is no {tmp_path}/Python.h")
