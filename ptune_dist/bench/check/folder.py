"""What a check has found so far: one JSON file per part, written after each step, so that a later call continues.

A part's file has name, about, status, seconds and steps. A step has name, status, seconds, and a result or a reason.
Its machine has the date, the commit, the versions and the hardware of that step's call.

Status of a step: `done`; `failed`; `cut` by the end of the time or by Ctrl-C; a step that is not in the file has not
been started. Status of a part: `done`, `failed` (every step has ended, at least one in failure) or `begun`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptune_dist.bench.check.plan import Part
from ptune_dist.common.files import replace_file
from ptune_dist.errors import UserError

DONE = "done"
FAILED = "failed"
CUT = "cut"
BEGUN = "begun"


@dataclass
class StepRecord:
    """How a step has ended."""

    name: str
    status: str
    seconds: float
    reason: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


class CheckFolder:
    """The output folder."""

    def __init__(self, path: Path):
        """Raises UserError if the folder cannot be made."""
        self.path = path
        try:
            (path / "parts").mkdir(parents=True, exist_ok=True)
            (path / "logs").mkdir(exist_ok=True)
            (path / ".gitignore").write_text("# large, and seldom read\nlogs/\n*.gz\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: {path}: {error.strerror}") from None

    def log_of(self, part: Part, step: str) -> Path:
        return self.path / "logs" / f"{part.name}-{step}.log"

    def records(self, part: Part) -> dict[str, StepRecord]:
        """What is known about a part's steps, by name. Raises UserError for a damaged file."""
        content = self._read(part)
        try:
            return {step["name"]: StepRecord(**step) for step in content.get("steps", [])}
        except (TypeError, KeyError) as error:
            raise UserError(f"{self._file(part)}: not a part of a check: {error}") from None

    def add(self, part: Part, record: StepRecord) -> None:
        """Keep how a step has ended, instead of what was known about it."""
        records = self.records(part) | {record.name: record}
        self.write(part, records)

    def write(self, part: Part, records: dict[str, StepRecord]) -> None:
        content = {
            "name": part.name,
            "about": part.about,
            "status": part_status(part, records),
            "seconds": round(sum(record.seconds for record in records.values()), 1),
            "steps": [asdict(record) for record in records.values()],
        }
        write_json(self._file(part), content)

    def forget(self, part: Part) -> None:
        self._file(part).unlink(missing_ok=True)

    def _file(self, part: Part) -> Path:
        return self.path / "parts" / f"{part.name}.json"

    def _read(self, part: Part) -> dict[str, Any]:
        try:
            return json.loads(self._file(part).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self._file(part)}: cannot be read: {error}") from None


def part_status(part: Part, records: dict[str, StepRecord]) -> str:
    """`done`, `failed`, or `begun` while a step has still to run."""
    found = [records[step.name].status if step.name in records else "" for step in part.steps]
    if all(status in (DONE, FAILED) for status in found):
        return FAILED if FAILED in found else DONE
    return BEGUN if records else ""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file; a reader sees the old content or the new."""
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
