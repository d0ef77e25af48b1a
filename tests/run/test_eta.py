"""When a run will end."""

import pytest

from ptune_dist.common.progress_line import ProgressLine, render_duration
from ptune_dist.run.eta import Eta


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_evaluations_and_the_first_step_do_not_count_as_steps(clock: list[float]):
    eta = Eta(max_steps=20, evaluate_every=8)
    clock[0] += 100.0
    eta.count_evaluation()
    for seconds in (30.0, 2.0, 2.0):
        clock[0] += seconds
        eta.count_steps()
    assert eta.left_s(3) == 17 * 2.0 + 3 * 100.0  # at 8, 16 and 20
    assert eta.left_s(8) == 12 * 2.0 + 3 * 100.0  # the one at 8 has not begun
    assert eta.left_s(9) == 11 * 2.0 + 2 * 100.0
    local = Eta(max_steps=64, evaluate_every=0)
    for seconds in (90.0, 32.0):  # periods of 16 local steps
        clock[0] += seconds
        local.count_steps(16)
    assert local.left_s(32) == 32 * 2.0
    assert Eta(max_steps=20, evaluate_every=0, evaluations_s=5.0, num_evaluations=1).left_s(3) == 5.0


def test_what_takes_long_is_shown_now_and_then(clock: list[float], capsys: pytest.CaptureFixture):
    line = ProgressLine("evaluating rows", 100)
    for _ in range(99):
        clock[0] += 0.25  # exact in floating point
        line.count()
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "evaluating rows: 12/100, ETA 0:00:22",
        "evaluating rows: 52/100, ETA 0:00:12",
        "evaluating rows: 92/100, ETA 0:00:02",
    ]
    assert render_duration(3700.4) == "1:01:40"


def test_weights_are_counted_in_gib(clock: list[float], capsys: pytest.CaptureFixture):
    line = ProgressLine("loading weights", 4 << 30, unit="GiB")
    clock[0] += 10.0
    line.count(1 << 30)
    assert capsys.readouterr().err == "loading weights: 1.00/4.00 GiB, ETA 0:00:30\n"
