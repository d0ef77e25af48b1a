"""The table of local steps is filled from results."""

import json
from pathlib import Path

from ptune_dist.bench.local_steps import PERIODS, list_settings, main, name_of


def test_the_table_has_means_and_ranges_of_seeds_and_the_bytes_of_each_period(tmp_path: Path) -> None:
    runs = {name: [{"loss": 1.0, "exact_match": 0.5}, {"loss": 2.0, "exact_match": 0.7}] for name in list_settings()}
    runs[name_of(16, 4, "mean")] = [{"loss": 3.0, "exact_match": 0.25}, {"loss": 4.0, "exact_match": 0.35}]
    sent = {str(period): 12345.4 / period for period in (1, *PERIODS)}
    out, document = tmp_path / "out.json", tmp_path / "doc.md"
    out.write_text(json.dumps({"steps": 128, "runs": runs, "bytes_per_step": sent}))
    document.write_text("<!-- local steps -->\nold\n<!-- end local steps -->\n")
    assert main(["--out", str(out), "--document", str(document), "--again"]) == 0
    usual = "1.500 (1.000-2.000) | 0.600 (0.500-0.700)"
    lines = document.read_text().splitlines()
    assert f"| 1 | - | 12,345 | {usual} | {usual} |" in lines
    assert f"| 16 | 4 | 772 | 3.500 (3.000-4.000) | 0.300 (0.250-0.350) | {usual} |" in lines
