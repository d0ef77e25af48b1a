"""Survey architectures: `python -m tests.architectures [--out FILE] [KIND ...]`; a second call resumes.

Rows are made in a process that handles many of them; one that crashes or hangs costs its row.
"""

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.architectures.bases import build_base, kinds
from tests.processes import ROOT

MAX_S = 90  # of one row


def survey_row(kind: str, family: str, folder: Path) -> dict[str, Any]:
    from ptune_dist.base.source import load_shape
    from ptune_dist.families.find import find_family
    from tests.architectures.checks import compare_loss, outcome_of
    from tests.architectures.runs import checks_of

    began = time.perf_counter()
    row: dict[str, Any] = {"kind": kind, "family": family}
    made = outcome_of(lambda out: build_base(kind, family, out) and "", folder)
    if made["result"] != "works":
        return row | {"base": made}
    row["loss"] = outcome_of(compare_loss, folder, family)
    if row["loss"]["result"] == "not tried":
        return row | {"base": row.pop("loss")}
    if row["loss"]["result"] == "works":
        own = find_family(load_shape(str(folder)), "auto", str(folder)).name
        for name, check in checks_of(own).items():
            row[name] = outcome_of(check, folder, own)
            if name == "float32" and row[name]["result"] != "works":
                break  # the others ask for its run
    row["seconds"] = round(time.perf_counter() - began, 2)
    return row


def work() -> None:
    """Answer lines `KIND FAMILY` with lines of JSON, on a stream of its own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        kind, family = line.split()
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(survey_row(kind, family, Path(folder))), file=answers, flush=True)


class Worker:
    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, kind: str, family: str) -> dict[str, Any]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.architectures", "--worker"],
                cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{kind} {family}\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answer = self.process.stdout.readline() if selector.select(MAX_S) else ""
        if answer:
            return json.loads(answer)
        self.process.kill()
        status = self.process.wait()
        self.process = None
        why = "no answer in time" if status == -9 else f"the process ended with {status}"
        return {"kind": kind, "family": family, "base": {"result": "fails", "line": why}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("architectures.jsonl"))
    parser.add_argument("--json", type=Path, help="write all rows of --out there, for docs/bases.md")
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        work()
        return
    done = {json.loads(line)["kind"] for line in args.out.open()} if args.out.exists() else set()
    worker = Worker()
    with args.out.open("a") as out:
        for family, names in kinds().items():
            for kind in names:
                if kind not in done and (not args.kinds or kind in args.kinds):
                    row = worker.ask(kind, family)
                    print(json.dumps(row), file=out, flush=True)
    if args.json:
        save_rows(args.out, args.json)


def save_rows(found: Path, out: Path) -> None:
    """The rows of a survey with what they depend on, without times, so that a second survey gives the same file."""
    rows = [json.loads(line) for line in found.open()]
    order = {kind: number for number, kind in enumerate(kind for names in kinds().values() for kind in names)}
    rows = sorted(({k: v for k, v in row.items() if k != "seconds"} for row in rows), key=lambda r: order[r["kind"]])
    versions = {name: version(name) for name in ("transformers", "torch", "deepspeed", "peft")}
    lines = ",\n".join(json.dumps(row) for row in rows)
    out.write_text(f'{{"versions": {json.dumps(versions)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
