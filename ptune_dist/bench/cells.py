"""Measurements in cells that may be stopped: a cell that the results have is not run again."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from ptune_dist.bench.machine import describe_machine
from ptune_dist.bench.quality import fill_block
from ptune_dist.cluster.outcome import STOPPED, Outcome
from ptune_dist.common.files import replace_file


class Cell(Protocol):
    """One measurement. digest: of everything that its result depends on."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...


C = TypeVar("C", bound=Cell)
Run = Callable[[C], dict[str, Any] | None]  # a cell's result, or None where it was asked to stop


def measure_cells(
    args: argparse.Namespace, name: str, cells: Sequence[C], run: Run[C], mark: str, render: Callable[[Any], str]
) -> tuple[int, dict[str, Any]]:
    """Run what --out lacks and fill --document; returns an exit status and the results. Raises UserError."""
    content = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    content = {"name": name, "cells": {}} | content
    status = 0 if args.again else run_missing(args, cells, run, content)
    if args.document:
        fill_block(args.document, mark, render(content))
    return status, content


def run_missing(args: argparse.Namespace, cells: Sequence[C], run: Run[C], content: dict[str, Any]) -> int:
    """Run the cells that are missing; returns an exit status."""
    began = time.monotonic()
    longest_s = 0.0
    for cell in cells:
        done = content["cells"].get(cell.name, {}).get("config") == cell.digest
        if done or (args.cell and cell.name not in args.cell):
            continue
        cell_began = time.monotonic()
        if cell_began - began + longest_s > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over: the same command continues with {cell.name}")
            return Outcome(STOPPED).exit_status
        print(f"cell {cell.name}", flush=True)
        found = run(cell)
        if found is None:
            return Outcome(STOPPED).exit_status
        content["cells"][cell.name] = {"config": cell.digest, **found}
        content |= describe_machine()
        replace_file(args.out, (json.dumps(content, indent=1) + "\n").encode())
        longest_s = max(longest_s, time.monotonic() - cell_began)
    return 0
