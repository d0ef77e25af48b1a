"""The table of what mutation runs found, made from results.json."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
README = FOLDER / "README.md"
BEGIN, END = "<!-- filled: results -->\n", "<!-- end filled -->\n"


def count_outcomes(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """share: of the killed among those that are not equivalent."""
    kinds = [outcome["outcome"] for outcome in outcomes]
    counts = {kind: kinds.count(kind) for kind in ("killed", "equivalent", "survived")}
    share = counts["killed"] / max(1, counts["killed"] + counts["survived"])
    return {"sampled": len(kinds), **counts, "share": round(share, 3)}


def render_table(results: dict[str, Any]) -> str:
    rows = [(name, count_outcomes(result["mutants"])) for name, result in results.items()]
    lines = [
        "| area | sampled | killed | equivalent | survived | killed of all but equivalent |",
        "|---|---|---|---|---|---|",
    ]
    for name, counts in [*rows, ("all", count_outcomes([m for r in results.values() for m in r["mutants"]]))]:
        numbers = [str(counts[kind]) for kind in ("sampled", "killed", "equivalent", "survived")]
        lines.append(f"| {name} | {' | '.join(numbers)} | {100 * counts['share']:.0f}% |")
    return "\n".join(lines)


def fill_table(text: str, results: dict[str, Any]) -> str:
    """README.md with the table of these results."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{render_table(results)}\n\n{END}{rest.partition(END)[2]}"


def load_results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))
