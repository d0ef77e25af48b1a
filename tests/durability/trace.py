"""What a process asks of the kernel for the files of a folder, in order, by a library that is preloaded into it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


def build_preloaded(name: str, work: Path, folder: Path = Path(__file__).parent) -> Path:
    """Compile a C file of a folder, this one's, into a library. Skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = work / f"{name}.so"
    source = folder / f"{name}.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


class Call(NamedTuple):
    """`operation` is write, fsync, rename, mkdir or remove; `to` is the new name of a rename."""

    process: int
    operation: str
    path: Path
    to: Path | None


class Trace:
    """Traces processes that get `env`; paths are absolute."""

    def __init__(self, root: Path, work: Path):
        """Only calls for what is under `root` are recorded."""
        library = build_preloaded("trace", work)
        self._log = work / "calls"
        self.env = {"LD_PRELOAD": str(library), "TRACE_ROOT": str(root), "TRACE_LOG": str(self._log)}

    def calls(self) -> list[Call]:
        found = []
        for line in self._log.read_text().splitlines():
            process, operation, path, to = line.split("\t")
            found.append(Call(int(process), operation, Path(os.path.normpath(path)), Path(to) if to else None))
        return found


def find_risks(calls: list[Call]) -> list[str]:
    """Where a power failure could lose or tear what the calls made durable by renaming it; empty where all is well.

    A file that gets its final name must have been flushed since its last write. So must all files of a folder that gets
    its final name, and the folder itself since its last entry. After a rename the parent folder must be flushed before
    anything that the new name replaces is removed, and before the process ends. The entries of all new folders above it
    must have been flushed too.
    """
    risks: list[str] = []
    unflushed: set[Path] = set()  # files written, temporary folders with new entries
    made: set[Path] = set()  # new folders whose entry is not flushed
    renamed: set[Path] = set()  # new names whose parent is not flushed
    for call in calls:
        if call.operation == "write":
            unflushed.add(call.path)
        elif call.operation == "mkdir":
            made.add(call.path)
        elif call.operation == "fsync":
            unflushed.discard(call.path)
            made = {path for path in made if path.parent != call.path}
            renamed = {path for path in renamed if path.parent != call.path}
        elif call.operation == "rename" and call.to is not None and not is_temporary(call.to):
            made.discard(call.path)
            parts = [path for path in unflushed | made if path == call.path or call.path in path.parents]
            risks += [f"{path} was not flushed before {call.to} got its name" for path in parts]
            lost = [path for path in made if path in call.to.parents]
            risks += [f"{path}, where {call.to} got its name, may be lost itself" for path in lost]
            renamed.add(call.to)
        elif call.operation == "remove" and not is_temporary(call.path):
            kept = [path for path in renamed if path.parent in call.path.parents]
            risks += [f"{call.path} was removed before the name of {path} was flushed" for path in kept]
    return risks + [f"the name of {path} was never flushed" for path in sorted(renamed)]


def is_temporary(path: Path) -> bool:
    return any(part.startswith((".writing-", ".old-")) for part in path.parts)
