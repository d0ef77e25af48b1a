"""The page of a check: README.md with every figure found so far, made from the JSON files of the parts."""

from typing import Any

from ptune_dist.bench.check.chart import Bar, draw_speeds
from ptune_dist.bench.check.folder import CheckFolder, StepRecord, part_status
from ptune_dist.bench.check.plan import Part
from ptune_dist.bench.harness import check_agreement, compare_sides, summarize
from ptune_dist.bench.report import COLUMNS, case_rows, describe_agreement, describe_where

CHART = "speeds.png"
IN_JSON_ONLY = ("loss_curve", "passed_tests")


def write_page(parts: list[Part], folder: CheckFolder, machine: dict[str, Any], *, is_tiny: bool = False) -> None:
    """Write README.md and, if a benchmark has been run, the chart. `machine` is that of this call."""
    records = {part.name: folder.records(part) for part in parts}
    cases = {part.name: build_cases(part, records[part.name]) for part in parts if part.matrix}
    warning = ["**Tiny shapes: the parts were tried, and the figures mean nothing.**", ""] if is_tiny else []
    lines = ["# First hour on a GPU", "", *warning, describe_where(machine), "", *overview(parts, records), ""]
    published = {label: speed for part in parts for label, speed in part.published.items()}
    compared = {part.name: cases[part.name] for part in parts if part.matrix and part.matrix.baseline}
    if draw_speeds(find_bars(compared), published, folder.path / CHART):
        lines += [f"![tokens per second of every side]({CHART})", ""]
    for part in parts:
        lines += render_part(part, records[part.name], cases.get(part.name, []))
    text = "\n".join(lines).rstrip() + "\n"
    (folder.path / "README.md").write_text(text, encoding="utf-8")


def overview(parts: list[Part], records: dict[str, dict[str, StepRecord]]) -> list[str]:
    """A table of how far every part is."""
    rows = [["part", "status", "steps", "seconds", "commit"], ["---", "---", "---:", "---:", "---"]]
    for part in parts:
        found = records[part.name]
        num_done = sum(record.status == "done" for record in found.values())
        commits = sorted({commit_of(record.machine) for record in found.values()} - {""})
        seconds = f"{sum(record.seconds for record in found.values()):.0f}" if found else ""
        status = part_status(part, found) or "not begun"
        rows.append([part.name, status, f"{num_done} of {len(part.steps)}", seconds, ", ".join(commits)])
    return table(rows)


def commit_of(machine: dict[str, Any]) -> str:
    code = machine.get("code") or {}
    return code.get("commit", "")[:12] + ("+" if code.get("changed") else "")


def render_part(part: Part, records: dict[str, StepRecord], cases: list[dict[str, Any]]) -> list[str]:
    """The section of a part that has begun."""
    if not records:
        return []
    lines = [f"## {part.name}", "", part.about, ""]
    for case in cases:
        lines += render_case(case, part.matrix.baseline if part.matrix else None)
        lines += compare_with_published(case, part.published)
    if not part.matrix:
        for record in records.values():
            lines += render_result(record.result)
    lines += [f"- {record.name}: {record.status}: {record.reason}" for record in records.values() if record.reason]
    return [*lines, ""]


def build_cases(part: Part, records: dict[str, StepRecord]) -> list[dict[str, Any]]:
    """The cases of a matrix in the form of a result JSON, from the steps that are done."""
    assert part.matrix is not None
    found = []
    for case in {step.case.name: step.case for step in part.steps if step.case}.values():
        done = [step for step in part.steps if step.case is case and is_done(records.get(step.name))]
        runs = [
            {"side": step.side, "repeat": step.repeat, "result": records[step.name].result, "others_cpu_share": None}
            for step in done
        ]
        sides = list(dict.fromkeys(step.side for step in done))
        if sides:
            found.append(
                {
                    "name": case.name,
                    "about": case.about,
                    "sides": {
                        side: summarize([run["result"] for run in runs if run["side"] == side]) for side in sides
                    },
                    "ratios": ratios(runs, sides, part.matrix.baseline),
                    "agreement": check_agreement(case, runs) if len(sides) > 1 else None,
                }
            )
    return found


def is_done(record: StepRecord | None) -> bool:
    return record is not None and record.status == "done"


def ratios(runs: list[dict[str, Any]], sides: list[str], baseline: str | None) -> dict[str, Any]:
    """Ratios to the baseline within the repeats that all sides have done; empty if there is none."""
    if baseline not in sides:
        return {}
    repeats = set.intersection(*({run["repeat"] for run in runs if run["side"] == side} for side in sides))
    paired = [run for run in runs if run["repeat"] in repeats]
    return compare_sides(paired, baseline) if paired else {}


def render_case(case: dict[str, Any], baseline: str | None) -> list[str]:
    """A table of one case, with a line about agreement."""
    names = [name for name in COLUMNS if any(name in side for side in case["sides"].values())]
    header = ["side", *(COLUMNS[name][0] for name in names)]
    rows = [header, ["---", *["---:"] * len(names)], *case_rows(case, baseline, " ")]
    lines = [f"**{case['name']}**: {case['about'].strip()}", "", *table(rows), ""]
    agreement = describe_agreement(case)
    return [*lines, f"- {agreement}", ""] if agreement else lines


def compare_with_published(case: dict[str, Any], published: dict[str, float]) -> list[str]:
    """A line for each side and each figure of others."""
    lines = [
        f"- {side}: {figures['tokens_per_s']['median'] / speed:.2f}x the {speed:,.0f} tokens/s of {label}"
        for label, speed in published.items()
        for side, figures in case["sides"].items()
        if "tokens_per_s" in figures
    ]
    return [*lines, ""] if lines else []


def render_result(result: dict[str, Any]) -> list[str]:
    """A result of any form: numbers and texts as one table, lists of mappings and mappings as tables of their own."""
    result = {k: v for k, v in result.items() if k not in IN_JSON_ONLY}
    plain = {k: v for k, v in result.items() if isinstance(v, (int, float, str)) and v != ""}
    lines = (
        [*table([["figure", "value"], ["---", "---:"], *([k, show(v)] for k, v in plain.items())]), ""] if plain else []
    )
    for name, value in result.items():
        if isinstance(value, dict) and value:
            rows = [[name, "value"], ["---", "---:"], *([k, show(v)] for k, v in value.items())]
            lines += [*table(rows), ""]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            header = list(value[0])
            rows = [header, ["---"] * len(header), *([show(row[key]) for key in header] for row in value)]
            lines += [f"{name}:", "", *table(rows), ""]
        if isinstance(value, list) and value and isinstance(value[0], str):
            lines += [f"{name}: {', '.join(value)}", ""]
    return lines


def show(value: object) -> str:
    """A figure as text."""
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("<", "&lt;")


def table(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


def find_bars(cases: dict[str, list[dict[str, Any]]]) -> list[Bar]:
    """A bar for every side whose tokens/s are known."""
    return [
        Bar(case["name"], side, figures["tokens_per_s"]["median"])
        for part in cases.values()
        for case in part
        for side, figures in case["sides"].items()
        if "tokens_per_s" in figures
    ]
