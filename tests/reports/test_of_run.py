"""A finished run has a page of its own, without matplotlib, and nothing that goes wrong with it harms the run."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ptune_dist.reports.charts import Chart, Series
from ptune_dist.reports.of_run import write_run_report
from ptune_dist.reports.svg import Axis, list_ticks, render_svg, show
from tests.processes import ROOT, process_env
from tests.reports.test_compare import write_run

SVG = "{http://www.w3.org/2000/svg}"


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each line."""
    lines = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()] for line in lines]


def texts_of(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_points_stand_where_the_ticks_say():
    svg = render_svg(Chart("loss", "loss <in> training", "step", [Series("a", [0, 5, 10], [1.0, 3.0, 2.0])]))
    ((first, middle, last),) = points_of(svg)
    assert first[0] < middle[0] < last[0] and middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.02)
    assert first[1] > last[1] > middle[1]  # larger numbers are higher up
    assert first[1] - last[1] == pytest.approx(last[1] - middle[1], abs=0.02)
    assert {"loss <in> training", "step", "1", "2", "3", "10"} <= set(texts_of(svg))


def test_series_have_a_legend_and_what_is_not_finite_is_left_out():
    series = [Series("a&b", [1, 2, 3], [1.0, float("nan"), 2.0]), Series("c", [1, 2], [float("inf"), 1.5])]
    svg = render_svg(Chart("x", "x", "step", series, "lines and points"))
    assert [len(points) for points in points_of(svg)] == [2, 1]
    assert {"a&b", "c"} <= set(texts_of(svg))
    assert len(list(ET.fromstring(svg).iter(f"{SVG}circle"))) == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.05, 0.3, [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (-3, 3, [-3, -2, -1, 0, 1, 2, 3]),
        (2.0001, 2.0002, [2.0001, 2.00012, 2.00014, 2.00016, 2.00018, 2.0002]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert list_ticks(low, high) == pytest.approx(expected)


def test_numbers_of_ticks_are_short():
    assert [show(v) for v in (0, 0.5, 1200, 200000, 0.0003, 1e-7)] == ["0", "0.5", "1200", "2e5", "3e-4", "1e-7"]
    assert Axis([3.0, 3.0], 0, 100).place(3.0) == 50
    assert Axis([0.001, 0.1], 0, 100, is_log=True).place(0.01) == 50


def test_long_runs_keep_their_last_point():
    series = Series("a", list(range(5001)), [float(step) for step in range(5001)])
    ((*_, before, last),) = points_of(render_svg(Chart("x", "x", "step", [series])))
    assert last[0] == 466 and before[0] < last[0]


def test_the_page_of_a_run_has_what_the_prompt_stands_beside(tmp_path):
    run = write_run(tmp_path / "run", ["yes"] * 60)
    summary = (run / "summary.json").read_text()
    more = '"before": {"loss": 2.25, "accuracy": 0.125}, "base_without_prompt": {"loss": 3.75}, "validation"'
    (run / "summary.json").write_text(summary.replace('"validation"', more))
    code = (
        "import sys; from pathlib import Path; from ptune_dist.reports.of_run import write_run_report;"
        f"write_run_report(Path({str(run)!r})); assert not {{'matplotlib', 'torch'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=process_env(), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    page = (run / "report.html").read_text()
    row = re.search(r"<tr><td>loss</td>(.*?)</tr>", page, re.DOTALL).group(1)
    assert re.findall(r"\d\.\d{4}", row) == ["3.7500", "2.2500", "0.5000"]
    assert page.count("<svg") == 5 and "In brackets" not in page
    assert not re.search(r'(src|href)="', page)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", ["yes"] * 60)
    (run / "metrics.jsonl").write_text("{damaged")
    write_run_report(run)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {run / 'report.html'} was not written: {run}: a file of this run is damaged"
    assert not Path(run / "report.html").exists()
