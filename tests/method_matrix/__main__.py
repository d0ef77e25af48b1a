"""Try every method in every family: `python -m tests.method_matrix [--out FOLDER] [--json FILE] [ROW ...]`.

Each row takes two launches, one of one process and one of two ranks. Rows that are done are left out, so a second call
resumes. `--json docs/methods.json` writes what docs/fill_reference.py renders; rows that were not tried stay as they
are there. ROW: words that a row's name contains.
"""

import argparse
import json
import shutil
from importlib.metadata import version
from pathlib import Path

from tests.commands import run_module
from tests.conftest import build_tiny_base
from tests.method_matrix.cases import BASES, OTHER_BASES, Action, Plan, Row, list_rows, write_rows
from tests.method_matrix.judge import Judge, fails

WORKER = str(Path(__file__).with_name("worker.py"))
MAX_S = 240  # of the runs of one row
VERSIONS = ("transformers", "torch", "deepspeed", "peft")


def launch(plan: Plan, name: str, actions: list[Action], num_ranks: int) -> None:
    """A process that crashes or hangs costs the cells of its row."""
    file = plan.folder / f"{name}.json"
    file.write_text(json.dumps([[a.do, str(a.folder), str(a.config), a.overrides] for a in actions]))
    done = run_module(WORKER, str(file), num_ranks=num_ranks, timeout=MAX_S)
    (plan.folder / f"{name}.log").write_text(done.stdout + done.stderr)


def try_row(root: Path, row: Row) -> dict:
    """The cells of one row, by name."""
    plan = begin(root, row)
    judge = Judge(plan)
    launch(plan, "one", list(plan.on_one()), 1)
    if judge.plain()["result"] == "works":
        launch(plan, "two", list(plan.on_two()), 2)
    return {"family": row.family, "method": row.method, "options": row.options, "cells": judge.cells()}


def try_further(root: Path, row: Row, known: dict) -> dict:
    """A row of the table with its cell of `init: file` tried again."""
    if "further" not in known["cells"]:
        return known
    plan = begin(root, row)
    launch(plan, "one", list(plan.continue_from_file()), 1)
    return known | {"cells": known["cells"] | {"further": Judge(plan).further()}}


def try_refused(root: Path, row: Row, known: dict) -> dict:
    """A row of the table with the lines of what is refused as they are now; what is refused no longer fails."""
    refused = [name for name, cell in known["cells"].items() if cell["result"] == "refused"]
    if not refused:
        return known
    plan = begin(root, row)
    judge = Judge(plan)
    runs = {name: run_of(name) for name in refused}
    needed = {"plain", "adapter", "from_adapter"} | set(runs.values())
    launch(plan, "one", [a for a in (*plan.on_one(), *plan.on_two()) if a.folder.name in needed], 1)
    cells = dict(known["cells"])
    for name, run in runs.items():
        cell = judge.outcome(run)
        cells[name] = cell if cell["result"] == "refused" else fails("it is refused no longer: try the whole row")
    return known | {"cells": cells}


def run_of(cell: str) -> str:
    """The run whose refusal a cell tells."""
    kind, _, placement = cell.partition(" ")
    named = {
        "cache": f"{placement}-cached",
        "placement": f"{placement}3",
        "export": "adapter",
        "adapter": "from_adapter",
    }
    return named.get(kind, cell)


def begin(root: Path, row: Row) -> Plan:
    """The plan of a row, in an empty folder."""
    plan = Plan(root, row)
    shutil.rmtree(plan.folder, ignore_errors=True)
    plan.folder.mkdir(parents=True)
    return plan


def save(rows: list[dict], out: Path) -> None:
    versions = {name: version(name) for name in VERSIONS}
    lines = ",\n".join(json.dumps(row) for row in rows)
    out.write_text(f'{{"versions": {json.dumps(versions)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def prepare(root: Path) -> None:
    """Rows and bases for all runs."""
    write_rows(root)
    for kind in {*BASES.values(), *OTHER_BASES.values()}:
        if not (root / "bases" / kind).exists():
            build_tiny_base(kind, root / "bases" / kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("method_matrix"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--further", action="store_true", help="try the column `init: file` alone, of rows in --json")
    parser.add_argument("--refused", action="store_true", help="try what is refused alone, of rows in --json")
    args = parser.parse_args()
    root = args.out.resolve()
    root.mkdir(parents=True, exist_ok=True)
    prepare(root)
    found: list[dict] = []
    earlier = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    for row in list_rows():
        file = root / f"{row.name}.json"
        known = next((one for one in earlier if identity_of(one) == (row.family, row.method, row.options)), None)
        if not file.exists() and (not args.rows or any(word in row.name for word in args.rows)):
            only = try_further if args.further else try_refused if args.refused else None
            done = only(root, row, known) if only and known else try_row(root, row)
            file.write_text(json.dumps(done))
            say(row, done["cells"])
        if file.exists():
            found.append(json.loads(file.read_text()))
        elif known:
            found.append(known)
    if args.json:
        save(found, args.json)


def identity_of(row: dict) -> tuple[str, str, dict]:
    return row["family"], row["method"], row["options"]


def say(row: Row, cells: dict[str, dict[str, str]]) -> None:
    bad = {name: cell["line"][:160] for name, cell in cells.items() if cell["result"] == "fails"}
    print(row.name, f"fails: {bad}" if bad else "ok", flush=True)


if __name__ == "__main__":
    main()
