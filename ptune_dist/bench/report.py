"""Render a result JSON as tables, for the terminal and for documents, whose figures are never typed by hand.

`python -m ptune_dist.bench.report docs/benchmarks/README.md` fills every block of that file that begins with
`<!-- result FILE.json -->` and ends with `<!-- end -->` from FILE.json beside it.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ptune_dist.errors import UserError

MIB = 1 << 20


def show_mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:,.0f}"


def show_kib(num_bytes: float) -> str:
    return f"{num_bytes / 1024:,.0f}"


# measure -> (heading, how a figure is shown); other measures are in the JSON only
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "samples_per_s": ("samples/s", "{:.2f}".format),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "cpu_s_per_1000_tokens": ("CPU s/1k tokens", "{:.2f}".format),
    "peak_memory_bytes": ("peak MiB", show_mib),
    "extra_memory_bytes": ("extra MiB", show_mib),
    "matmul_peak_per_s": ("matmul peak TFLOP/s", lambda value: f"{value / 1e12:,.2f}"),
    "matmul_share": ("of matmul peak", "{:.2f}".format),
    "recompiles": ("recompilations", "{:.0f}".format),
    "limit_hits": ("fell back", "{:.0f}".format),
    "load_s": ("load s", "{:.2f}".format),
    "peak_over_base_bytes": ("peak MiB in loading", show_mib),
    "base_bytes": ("base MiB held", show_mib),
    "of_float32": ("of float32's share", "{:.3f}".format),
    "of_bfloat16": ("of bfloat16's share", "{:.3f}".format),
    "gathered_bytes": ("MiB gathered in a pass", show_mib),
    "read_of_share": ("read of file's share", "{:.3f}".format),
    "forward_ms": ("forward ms", "{:.2f}".format),
    "backward_ms": ("backward ms", "{:.2f}".format),
    "kept_bytes": ("MiB kept", lambda value: f"{value / MIB:,.1f}"),
    "error": ("error", "{:.1e}".format),
    "save_ms": ("save ms", "{:.1f}".format),
    "slowest_save_ms": ("slowest save ms", "{:.1f}".format),
    "save_bytes": ("KiB saved", show_kib),
    "prompt_bytes": ("KiB of the prompt", show_kib),
    "of_allowed_bytes": ("of 4 prompts + 64 KiB", "{:.2f}".format),
    "seconds": ("seconds", lambda value: f"{value:.1f}" if value >= 1 else f"{value:.2f}"),
    "cpu_seconds": ("CPU seconds", "{:.1f}".format),
    "median_input_tokens": ("tokens of the median input", "{:.0f}".format),
    "median_answer_tokens": ("of the median answer", "{:.0f}".format),
    "rows_per_s": ("rows/s", "{:,.0f}".format),
    "rows_per_cpu_s": ("rows/s of a core", "{:,.0f}".format),
    "of_tokenizer": ("of the tokenizer's", "{:.2f}".format),
    "private_bytes_per_row": ("private bytes a row", "{:.2f}".format),
    "found_s": ("seconds until found", "{:.1f}".format),
    "steps_to_repeat": ("steps done again", "{:.0f}".format),
}
TIMED = ("samples_per_s", "load_s", "forward_ms", "save_ms", "seconds")  # a case without these only checks agreement
BLOCK = re.compile(r"(<!-- result (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def shown_measures(case: dict[str, Any]) -> list[str]:
    """The columns that at least one side of a case has."""
    return [name for name in COLUMNS if any(name in side for side in case["sides"].values())]


def case_rows(case: dict[str, Any], baseline: str | None, gap: str) -> list[list[str]]:
    """A row per side, with median, `gap` and spread; then a row per ratio to the baseline."""
    names = shown_measures(case)
    rows = []
    for side, figures in case["sides"].items():
        rows.append([side, *(show_spread(name, figures[name], gap) if name in figures else "" for name in names)])
    for side, ratios in case["ratios"].items():
        cells = [f"{ratios[name]['median']:.2f}x" if name in ratios else "" for name in names]
        rows.append([f"{side} / {baseline}", *cells])
    return rows


def show_spread(name: str, figure: dict[str, float], gap: str) -> str:
    """`median (minimum-maximum)`."""
    show = COLUMNS[name][1]
    median, least, most = (show(figure[key]) for key in ("median", "min", "max"))
    return median if least == most else f"{median}{gap}({least}-{most})"


def describe_agreement(case: dict[str, Any]) -> str | None:
    """Whether the sides of a case agree; None if the case does not ask."""
    found = case["agreement"]
    if found is None:
        return None
    difference = found["largest_difference"]
    shown = "cannot be compared" if difference is None else f"differs by {difference:.1e} at most"
    verdict = "the sides agree" if found["agrees"] else "THE SIDES DO NOT AGREE"
    return f"{case['name']}: {found['measure']} {shown} (tolerance {found['tolerance']:.0e}): {verdict}"


def describe_noise(content: dict[str, Any]) -> str | None:
    """The share of the machine that other work took while the sides ran; None if unknown."""
    shares = [run["others_cpu_share"] for case in content["cases"] for run in case["runs"]]
    known = sorted(share for share in shares if share is not None)
    if not known:
        return None
    return f"other work took {known[len(known) // 2]:.0%} of the machine in the median run, {known[-1]:.0%} at most"


def render_tables(content: dict[str, Any]) -> list[Table | str]:
    """A rich table for each timed case, then a line for each agreement and one about other work."""
    parts: list[Table | str] = []
    for case in content["cases"]:
        if set(TIMED) & set(shown_measures(case)):
            table = Table("side", title=case["name"], box=SIMPLE)
            for name in shown_measures(case):
                table.add_column(COLUMNS[name][0], justify="right", overflow="fold")
            for row in case_rows(case, content["matrix"]["baseline"], "\n"):
                table.add_row(*row)
            parts.append(table)
    lines = [describe_agreement(case) for case in content["cases"]] + [describe_noise(content)]
    return parts + [line for line in lines if line]


def describe_where(content: dict[str, Any]) -> str:
    """Date, machine, versions and commit in one line."""
    hardware = content["hardware"]
    code = content["code"] or {}
    where = [
        content["date"][:10],
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_bytes'] / (1 << 30):.0f} GiB",
        *hardware["gpus"],
        ", ".join(f"{name} {number}" for name, number in content["versions"].items()),
        f"commit {code['commit'][:12]}{' with changes' if code['changed'] else ''}" if code else "",
    ]
    return "; ".join(part for part in where if part) + "."


def render_markdown(content: dict[str, Any]) -> str:
    """The tables as Markdown, below a line with date, machine and versions."""
    parts = [describe_where(content)]
    for case in content["cases"]:
        names = shown_measures(case)
        if not set(TIMED) & set(names):
            continue
        header = ["side", *(COLUMNS[name][0] for name in names)]
        rows = [header, ["---"] + ["---:"] * len(names), *case_rows(case, content["matrix"]["baseline"], " ")]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"**{case['name']}**: {case['about'].strip()}\n\n{table}")
    lines = [describe_agreement(case) for case in content["cases"]] + [describe_noise(content)]
    return "\n\n".join(parts) + "\n\n" + "\n".join(f"- {line}" for line in lines if line) + "\n"


def fill_document(path: Path) -> None:
    """Rewrite the result blocks of a document from the JSON files next to it. Raises UserError."""
    text = path.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        raise UserError(f"{path}: no block that begins with <!-- result FILE.json --> and ends with <!-- end -->")

    def fill(match: re.Match) -> str:
        file = path.parent / match["file"]
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot read {file}: {error}") from None
        return f"{match[1]}\n{render_markdown(content)}\n{match[3]}"

    path.write_text(BLOCK.sub(fill, text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    for path in parser.parse_args().documents:
        fill_document(path)


if __name__ == "__main__":
    main()
