"""The table of local steps is filled from results."""

import json
from pathlib import Path

from ptune_dist.bench.local_steps import MEAN, PERIODS, SETTINGS, main, name_of


def test_the_table_has_means_and_ranges_of_seeds_and_the_bytes_of_each_period(tmp_path: Path) -> None:
    runs = {name_of(*one): [{"loss": 1.0, "exact_match": 0.5}, {"loss": 2.0, "exact_match": 0.7}] for one in SETTINGS}
    runs[name_of(16, 4, MEAN)] = [{"loss": 3.0, "exact_match": 0.25}, {"loss": 4.0, "exact_match": 0.35}]
    sent = {str(period): 12345.4 / period for period in PERIODS}
    out, document = tmp_path / "out.json", tmp_path / "doc.md"
    out.write_text(json.dumps({"steps": 64, "runs": runs, "bytes_per_step": sent}))
    document.write_text("<!-- local steps -->\nold\n<!-- end local steps -->\n")
    assert main(["--out", str(out), "--document", str(document), "--again"]) == 0
    lines = document.read_text().splitlines()
    assert "| 1 | - | - | 12,345 | 1.500 (1.000-2.000) | 0.600 (0.500-0.700) |" in lines
    assert "| 16 | 4 | 1, 0 | 772 | 3.500 (3.000-4.000) | 0.300 (0.250-0.350) |" in lines
    assert "| 64 | 4 | 0.7, 0.9 | 193 | 1.500 (1.000-2.000) | 0.600 (0.500-0.700) |" in lines
