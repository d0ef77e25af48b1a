"""The tables of what each method allows in docs/methods.md, from what `python -m tests.method_matrix` wrote."""

import json
from pathlib import Path
from typing import Any

from render_bases import escape

FILE = Path(__file__).parent / "methods.json"
YES_OR_NO = {  # cells, and the columns' names
    "int8": "int8",
    "bf16": "bf16",
    "recomputation": "recomputation",
    "micro-batches": "micro-batches",
    "sweep": "sweep",
    "resume": "resumes",
    "further": "`init: file`",
    "answers": "answers",
    "export": "to PEFT",
    "adapter": "from PEFT",
}
LISTS = {"placement": "placements", "ZeRO": "ZeRO", "cache": "context cache"}  # of the cells "placement prefix", ...
COLUMNS = ["method", *LISTS.values(), *YES_OR_NO.values()]
PLAIN = "plain"


def name_of(row: dict[str, Any]) -> str:
    """As a user writes it in YAML."""
    options = ", ".join(f"`{key}: {show(value)}`" for key, value in row["options"].items())
    return f"`{row['method']}`" + (f" with {options}" if options else "")


def show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def cells_of(row: dict[str, Any], kind: str) -> dict[str, dict[str, str]]:
    """Those of a list, by what stands in it."""
    return {name.removeprefix(f"{kind} "): cell for name, cell in row["cells"].items() if name.startswith(f"{kind} ")}


def render_cell(cell: dict[str, str] | None) -> str:
    return "-" if cell is None else {"works": "yes", "refused": "no"}.get(cell["result"], cell["result"])


def render_list(row: dict[str, Any], kind: str) -> str:
    found = cells_of(row, kind)
    parts = [name for name, cell in found.items() if cell["result"] == "works"]
    parts += [f"{name} fails" for name, cell in found.items() if cell["result"] == "fails"]
    return ", ".join(parts) or "no"


def render_row(row: dict[str, Any]) -> str:
    parts = [name_of(row)]
    parts += [render_list(row, kind) for kind in LISTS]
    parts += [render_cell(row["cells"].get(name)) for name in YES_OR_NO]
    return "| " + " | ".join(parts) + " |"


def render_refusals(rows: list[dict[str, Any]]) -> str:
    """Each line of a refusal once, with the methods that it is for."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for cell in row["cells"].values():
            if cell["result"] == "refused":
                names = found.setdefault(cell["line"].replace(row["method"], "METHOD"), [])
                if f"`{row['method']}`" not in names:
                    names.append(f"`{row['method']}`")
    return "\n".join(f"- {', '.join(names)}: {escape(line)}" for line, names in found.items())


def render_family(family: str, rows: list[dict[str, Any]]) -> str:
    """The table of the methods that a family has, and the lines that users see of what is refused."""
    table = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    table += [render_row(row) for row in rows if row["cells"][PLAIN]["result"] == "works"]
    parts = [f"### {family.capitalize()}", "\n".join(table), "What is refused, and with which line:"]
    return "\n\n".join([*parts, render_refusals(rows)])


def render_methods() -> str:
    """A table for each family."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    families = dict.fromkeys(row["family"] for row in found["rows"])
    parts = [f"Tried with {versions}."]
    parts += [render_family(family, [row for row in found["rows"] if row["family"] == family]) for family in families]
    return "\n\n".join(parts)
