"""The benchmark of start-up times: what it measures can be shown."""

from ptune_dist.bench.report import render_markdown
from ptune_dist.bench.start_up import COMMANDS, ROOT, measure_case


def test_the_table_has_both_versions_and_their_ratio():
    case = measure_case("--help", COMMANDS["--help"], {"before": ROOT, "now": ROOT}, repeats=2)
    assert 0 < case["sides"]["now"]["cpu_seconds"]["min"] < 5
    hardware = {"cpu": "a CPU", "cores": 2, "memory_bytes": 1 << 30, "gpus": []}
    where = {"date": "2026-11-26", "code": None, "versions": {}, "hardware": hardware}
    shown = render_markdown({**where, "matrix": {"baseline": "before"}, "cases": [case]})
    assert "| side | seconds | CPU seconds |" in shown and "| now / before |" in shown
