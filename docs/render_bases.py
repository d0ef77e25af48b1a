"""The table of architectures in docs/bases.md, from what `python -m tests.architectures` wrote to docs/bases.json."""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "bases.json"
CHECKS = {
    "loss": "loss",
    "validate": "validates",
    "float32": "trains",
    "int8": "int8",
    "resume": "resumes",
    "export": "exports",
    "evaluate": "evaluates",
    "generate": "answers",
    "contexts": "contexts",
    "prefix_tuning": "prefix tuning",
}
NEEDED = ("loss", "float32")  # without these an architecture is refused
RESULTS = ("works", "works in part", "refused", "fails", "not tried")


def result_of(row: dict[str, Any]) -> str:
    """One of RESULTS. An architecture whose prompts train but of which something else is refused works in part."""
    if "base" in row:
        return "not tried"
    found = [row[check]["result"] for check in CHECKS if check in row]
    if "fails" in found:
        return "fails"
    if any(row[check]["result"] == "refused" for check in NEEDED if check in row):
        return "refused"
    return "works in part" if "refused" in found else "works"


def render_counts(rows: list[dict[str, Any]]) -> str:
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines = ["| family | " + " | ".join(RESULTS) + " | all |", "| --- " * (len(RESULTS) + 2) + "|"]
    for family in [*families, "all"]:
        own = [row for row in rows if family in ("all", row["family"])]
        counts = [sum(result_of(row) == result for row in own) for result in RESULTS]
        lines.append(f"| {family} | " + " | ".join(str(count) for count in [*counts, len(own)]) + " |")
    return "\n".join(lines)


def render_row(row: dict[str, Any]) -> str:
    cells = [row[check]["result"] if check in row else "-" for check in CHECKS]
    tried = {"base": "base"} | CHECKS
    why: dict[str, list[str]] = {}
    for check, name in tried.items():
        if check in row and row[check]["line"]:
            why.setdefault(row[check]["line"], []).append(name)
    notes = "; ".join(f"{', '.join(names)}: {line}" for line, names in why.items())
    return f"| `{row['kind']}` | {result_of(row)} | " + " | ".join(cells) + f" | {escape(notes)} |"


def escape(text: str) -> str:
    for old, new in {"|": "\\|", "<": "&lt;", "*": "\\*", "_": "\\_", "[": "\\["}.items():
        text = text.replace(old, new)
    return text


def render_bases() -> str:
    """Counts, and a table for each family."""
    survey = json.loads(FILE.read_text(encoding="utf-8"))
    rows = survey["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in survey["versions"].items())
    parts = [f"Tried with {versions}.", render_counts(rows)]
    for family in dict.fromkeys(row["family"] for row in rows):
        header = ["architecture", "result", *CHECKS.values(), "notes"]
        table = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
        table += [render_row(row) for row in rows if row["family"] == family]
        parts.append(f"## {family.capitalize()}\n\n" + "\n".join(table))
    return "\n\n".join(parts)
