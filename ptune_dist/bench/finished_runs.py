"""The finished runs of a benchmark in a file, so that one that was stopped continues where it was."""

import json
from pathlib import Path
from typing import Any

from ptune_dist.bench.machine import describe_commit
from ptune_dist.bench.matrix import Matrix
from ptune_dist.errors import UserError


class FinishedRuns:
    """A line for each run, below a line that names the matrix and the commit: runs of others are never mixed in."""

    def __init__(self, path: Path, matrix: Matrix, *, resumes: bool):
        """Without `resumes`, or where there is no file yet, it begins anew. Raises UserError for a file of others."""
        self._path = path
        self._found: dict[tuple[str, str, int], dict[str, Any]] = {}
        head = {"matrix": matrix.model_dump(mode="json"), "commit": (describe_commit() or {}).get("commit")}
        lines = [json.dumps(head)]
        if resumes and path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # without a last line that was cut off
            if not lines or json.loads(lines[0]) != head:
                raise UserError(f"--resume: {path} is of another matrix or commit: leave --resume out to measure anew")
        for line in map(json.loads, lines[1:]):
            self._found[line["case"], line["run"]["side"], line["run"]["repeat"]] = line["run"]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def find(self, case: str, side: str, repeat: int) -> dict[str, Any] | None:
        return self._found.get((case, side, repeat))

    def add(self, case: str, run: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"case": case, "run": run}) + "\n")
