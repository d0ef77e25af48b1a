"""Lines about what takes long."""

import threading
import time

import pytest

from ptune_dist.common import progress_line
from ptune_dist.common.progress_line import BusyLine, ProgressLine


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress_line, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress_line, "_last_line_at", 0.0)


def test_what_takes_long_is_named_until_it_is_done(capsys):
    with BusyLine("loading the base", first_s=0.02):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and set(lines) == {"loading the base: 0:00:00 so far"}
    time.sleep(0.1)
    assert capsys.readouterr().err == "" and "progress" not in [thread.name for thread in threading.enumerate()]


def test_what_is_short_prints_nothing(capsys):
    with BusyLine("loading the base", first_s=5.0):
        pass
    assert capsys.readouterr().err == ""


def test_the_innermost_is_named_and_its_error_passes(capsys):
    with BusyLine("outer", first_s=0.05):
        with pytest.raises(ValueError, match="wrong"), BusyLine("inner"):
            time.sleep(0.3)
            raise ValueError("wrong")
        inner = capsys.readouterr().err.splitlines()
        time.sleep(0.3)
    outer = capsys.readouterr().err.splitlines()
    assert set(inner) == {"inner: 0:00:00 so far"}
    assert outer and {line.partition(":")[0] for line in outer} == {"outer"}


def test_many_short_parts_of_what_takes_long_are_not_silent(capsys):
    with BusyLine("outer", first_s=0.2):
        for i in range(10):
            with BusyLine(f"part {i}", first_s=0.2):
                time.sleep(0.1)
    assert len(capsys.readouterr().err.splitlines()) >= 2


def test_it_is_silent_while_progress_is_counted(capsys):
    line = ProgressLine("rows", 1000, between_s=0.0)
    with BusyLine("loading the base", first_s=1.0):
        for _ in range(12):
            time.sleep(0.1)
            line.count()
    assert {part.split(":")[0] for part in capsys.readouterr().err.splitlines()} == {"rows"}


def test_the_time_left_is_told_once_a_part_is_done():
    line = ProgressLine("rows", 4)
    assert line.render(65.0) == "rows: 0/4, 0:01:05 so far"
    line.done = 1
    assert line.render(65.0) == "rows: 1/4, ETA 0:03:15"


def test_only_the_first_rank_of_a_node_prints(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with BusyLine("loading the base", first_s=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
