"""How many faults do the tests find? Makes faulty versions of the code, one fault each, and runs the tests on each.

    python -m tests.mutation [--areas files,head] [--sample 30] [--seed 0] [--jobs 2] [--again] [--out FILE.json]

A mutant is killed when a test fails on it. `survivors.md` lists those that no test kills, with why; the equivalent ones
among them are not tried. `--out` (default: results.json beside this file) is updated for the areas that are run, and
the table in README.md is made from it. `--again` tries only the survivors in that file. The status is 1 where a
survivor is not listed, or where fewer than 90% of an area's mutants are killed. A run takes minutes, so it happens on
request only.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.mutation.areas import AREAS
from tests.mutation.results import README, RESULTS, count_outcomes, fill_table
from tests.mutation.survivors import load_survivors
from tests.mutation.trial import Workers, build_mutants, try_area

WANTED_SHARE = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("--areas", default=",".join(AREAS))
    parser.add_argument("--sample", type=int, default=30, help="mutants of each area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--again", action="store_true", help="try only the survivors in --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    results = json.loads(parsed.out.read_text()) if parsed.out.exists() else {}
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(Path(folder), parsed.jobs)
        for name in parsed.areas.split(","):
            mutants = build_mutants(AREAS[name], parsed.sample, parsed.seed)
            before = results[name]["mutants"] if parsed.again else []
            outcomes = try_area(AREAS[name].tests, mutants, before, workers)
            results[name] = {"sample": parsed.sample, "seed": parsed.seed, "mutants": outcomes}
            in_order = {area: results[area] for area in AREAS if area in results}
            parsed.out.write_text(json.dumps(in_order, indent=1) + "\n")
            status = max(status, report(name, outcomes))
    if parsed.out == RESULTS:
        README.write_text(fill_table(README.read_text(encoding="utf-8"), json.loads(RESULTS.read_text())))
    return status


def report(area: str, outcomes: list[dict[str, Any]]) -> int:
    """Print an area's counts and its survivors that are not listed; the exit status."""
    counts = count_outcomes(outcomes)
    print(area, json.dumps(counts), flush=True)
    known = load_survivors()
    survivors = [outcome for outcome in outcomes if outcome["outcome"] == "survived"]
    unlisted = [outcome for outcome in survivors if (outcome["path"], outcome["difference"]) not in known]
    for outcome in unlisted:
        print(f"survived: {outcome['name']}\n{outcome['difference']}\n", flush=True)
    return int(bool(unlisted) or counts["share"] < WANTED_SHARE)


if __name__ == "__main__":
    sys.exit(main())
