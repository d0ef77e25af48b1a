"""The writer writes at once; another node keeps what is to be written, and writes it where the writer is lost."""

import json

import pytest

from ptune_dist.run.eta import Eta
from ptune_dist.run.metrics_log import MetricsWriter, read_metrics
from ptune_dist.run.shared_pen import NUM_KEPT_STEPS, SharedLog, SharedPen


def test_only_the_writer_writes_and_the_next_one_writes_what_the_last_steps_had():
    written: list[int] = []
    pen = SharedPen()
    for step in range(6):
        pen(lambda step=step: written.append(step))
        pen.forget()
    assert not written
    pen.take()
    assert written == list(range(7 - NUM_KEPT_STEPS, 6))
    pen(lambda: written.append(9))
    assert written[-1] == 9
    pen.take()
    assert written[-1] == 9  # nothing is written twice


def test_what_a_node_kept_is_dropped_when_it_takes_over_the_state_of_others():
    pen = SharedPen()
    pen(lambda: pytest.fail("written"))
    pen.pass_on()
    pen.take()


def lines_of(step: int) -> tuple[dict, dict]:
    line = {"step": step, "loss": 1.0, "learning_rate": 0.1, "tokens_per_s": 1.0, "nodes": {"view": 1}}
    return line, {}


def test_the_next_writer_s_log_has_every_step_once(tmp_path, capsys):
    def open_from(step: int) -> MetricsWriter:
        return MetricsWriter(tmp_path, max_steps=9, first_step=step)

    pens = [SharedPen(), SharedPen()]
    logs = [SharedLog(open_from, pen, 1, Eta(9, 0)) for pen in pens]
    pens[0].take()
    for step in (1, 2, 3):
        for log, pen in zip(logs, pens, strict=True):
            if step < 3 or log is logs[1]:  # the first node is lost before it writes step 3
                log.step(*lines_of(step))
                pen.forget()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # as it was killed
    logs[1].tell("node first was lost")
    pens[1].take()
    logs[1].step(*lines_of(4))
    logs[0].step(*lines_of(3))  # one that was stopped for a while wakes up: its file is another one by now
    logs[1].close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["nodes"] == {"view": 1}
    assert "node first was lost" in (tmp_path / "train.log").read_text()
    assert "node first was lost" in capsys.readouterr().out
    logs[0].close()


def test_a_node_that_came_back_and_takes_over_drops_no_line_of_the_others(tmp_path):
    pens = [SharedPen(), SharedPen()]
    logs = [
        SharedLog(lambda step: MetricsWriter(tmp_path, max_steps=9, first_step=step), pen, 1, Eta(9, 0)) for pen in pens
    ]
    pens[0].take()
    logs[0].step(*lines_of(1))
    logs[0].close()  # it stalls before step 2, and is left behind
    pens[0].pass_on()
    logs[0].tell("node first joins")
    pens[1].take()
    for step in (2, 3):
        logs[1].step(*lines_of(step))
    logs[1].close()
    logs[0].continue_from(3)
    logs[0].step(*lines_of(4))
    pens[0].take()
    logs[0].say("step 5 comes next")
    logs[0].step(*lines_of(5))
    logs[0].close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_node_that_does_not_write_shows_its_progress_and_takes_over_with_the_right_eta(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pen = SharedPen()
    log = SharedLog(
        lambda step: MetricsWriter(tmp_path, max_steps=99, first_step=step, log_every=1), pen, 1, Eta(99, 0)
    )
    for step in range(1, 45):
        now[0] += 2.0
        log.eta.count_steps()
        log.step(*lines_of(step))
        pen.forget()
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 1/99", "step 32/99"]
    assert shown[1].endswith("ETA 0:02:14  (another node writes the run's folder)")
    pen.take()
    log.close()
    assert "step 44/99" in (text := capsys.readouterr().out) and "ETA 0:01:50" in text
