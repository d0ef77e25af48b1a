"""What a run writes while it trains; a resumed run has every step exactly once."""

import json
import os
import pty
import subprocess
import sys
import threading
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ptune_dist.run.metrics_log import (
    MetricsWriter,
    drop_lines_from_step,
    read_metrics,
    render_samples,
)
from tests.processes import process_env

SAMPLES = [{"input": "a | b", "wanted": "two\nlines", "answer": "[red]x[/red]"}]


def line(step: int, loss: float | None = None) -> dict:
    return {
        "step": step,
        "loss": 1 / step if loss is None else loss,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "samples_per_s": 8.0,
        "tokens_per_s": 1234.5,
        "peak_memory_bytes": 4096,
        "time_s": 0.1 * step,
    }


def scalars(run_dir, tag: str, member: str = "") -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard" / member)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_run_leaves_its_steps_in_metrics_jsonl_tensorboard_and_the_log(tmp_path, capsys):
    with MetricsWriter(tmp_path, max_steps=3, first_step=1) as metrics:
        for step in (1, 2, 3):
            metrics.step(line(step), {})
            assert read_metrics(tmp_path)[-1] == line(step)  # at once, not at the end
        metrics.evaluation(3, {"loss": 0.25, "exact_match": 0.5}, SAMPLES)
        metrics.say("all is well")
    assert read_metrics(tmp_path) == [line(1), line(2), line(3)]
    assert scalars(tmp_path, "train/loss") == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert scalars(tmp_path, "validation/exact_match") == {3: 0.5}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("validation/samples/text_summary")
    assert "two lines" in text.tensor_proto.string_val[0].decode()
    log = (tmp_path / "train.log").read_text()
    console = capsys.readouterr().out
    for said in ("step 1/3", "step 3/3", "1,234 tokens/s", "exact_match 0.5000", "ETA 0:00:00", "all is well"):
        assert said in log and said in console
    assert "\x1b" not in log + console  # plain lines where there is no terminal


def test_resuming_drops_lines_beyond_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, max_steps=9, first_step=1) as metrics:
        for step in range(1, 6):
            metrics.step(line(step, loss=7.0), {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    time.sleep(1 - time.time() % 1)  # TensorBoard orders files of one second by a counter that is read as text
    with MetricsWriter(tmp_path, max_steps=9, first_step=4) as metrics:
        for step in range(4, 10):
            metrics.step(line(step), {})
    assert [found["step"] for found in read_metrics(tmp_path)] == list(range(1, 10))
    assert read_metrics(tmp_path)[2:4] == [line(3, loss=7.0), line(4)]
    shown = scalars(tmp_path, "train/loss")
    assert list(shown) == list(range(1, 10)) and (shown[3], shown[4]) == (7.0, 0.25)


def test_each_member_has_its_own_lines_and_resuming_drops_those_beyond_the_checkpoint_too(tmp_path):
    members = {name: tmp_path / "members" / name for name in ("lr=0.1", "lr=0.2")}
    with MetricsWriter(tmp_path, max_steps=4, first_step=1, members=members) as metrics:
        for step in (1, 2, 3):
            metrics.step(line(step), {name: line(step, loss=7.0) for name in members})
    with MetricsWriter(tmp_path, max_steps=4, first_step=3, members=members) as metrics:
        metrics.step(line(3), {"lr=0.1": line(3)})  # the other is stopped
        metrics.evaluation(3, {"loss": 0.5}, SAMPLES, member="lr=0.1")
    assert read_metrics(tmp_path) == [line(1), line(2), line(3)]
    assert read_metrics(members["lr=0.1"]) == [line(1, loss=7.0), line(2, loss=7.0), line(3)]
    assert read_metrics(members["lr=0.2"]) == [line(1, loss=7.0), line(2, loss=7.0)]
    assert scalars(tmp_path, "train/loss", "lr=0.1") == pytest.approx({1: 7.0, 2: 7.0, 3: 1 / 3})
    assert scalars(tmp_path, "validation/loss", "lr=0.1") == {3: 0.5}


def test_resuming_with_a_full_disk_loses_no_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    before = "".join(json.dumps(line(step)) + "\n" for step in range(1, 20))
    file.write_text(before)
    script = """
import resource, sys
from pathlib import Path
from ptune_dist.run.metrics_log import drop_lines_from_step
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
drop_lines_from_step(Path(sys.argv[1]), 19)
"""
    failed = subprocess.run(
        [sys.executable, "-c", script, str(file)], env=process_env(), capture_output=True, text=True
    )
    assert "File too large" in failed.stderr
    assert file.read_text() == before


def test_there_is_nothing_to_drop_in_a_new_run(tmp_path):
    drop_lines_from_step(tmp_path / "metrics.jsonl", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_sees_a_bar_with_loss_speed_and_eta_and_the_log_stays_plain(tmp_path, monkeypatch):
    controller, terminal = pty.openpty()
    seen = bytearray()

    def read():
        try:
            while chunk := os.read(controller, 1 << 16):
                seen.extend(chunk)
        except OSError:  # the terminal is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        with MetricsWriter(tmp_path, max_steps=2, first_step=1) as metrics:
            metrics.step(line(1), {})
            metrics.say("[note] in brackets")
            metrics.step(line(2), {})
    reader.join(timeout=10)
    os.close(controller)
    shown = seen.decode()
    for said in ("step 2/2", "loss 0.5000", "1,234 tokens/s", "ETA", "[note] in brackets"):
        assert said in shown
    assert "\x1b" in shown and "\x1b" not in (tmp_path / "train.log").read_text()


def test_samples_are_a_table_that_no_answer_can_break():
    header, _, row = render_samples(SAMPLES).splitlines()
    assert header == "| input | wanted | answer |"
    assert row == "| a \\| b | two lines | [red]x[/red] |"


def test_every_line_is_json_by_itself(tmp_path):
    with MetricsWriter(tmp_path, max_steps=1, first_step=1) as metrics:
        metrics.step(line(1), {})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == line(1)


def test_tensorboard_has_no_empty_charts_and_each_member_s_settings(tmp_path):
    members = {name: tmp_path / "members" / name for name in ("lr=0.1", "lr=0.2")}
    settings = {name: {"learning_rate": 0.1} for name in members}
    with MetricsWriter(tmp_path, max_steps=1, first_step=1, members=members, settings=settings) as metrics:
        metrics.step(line(1) | {"num_gathers": 0}, {name: line(1) for name in members})
        metrics.ranks(1, [{"rank": 0, "base_bytes": 7, "gathered_bytes": 0}])
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert "rank_0/base_bytes" in tags
    assert not {"rank_0/rank", "rank_0/gathered_bytes", "train/num_gathers"} & set(tags)
    own = EventAccumulator(str(tmp_path / "tensorboard" / "lr=0.1")).Reload()
    assert own.Tags()["scalars"] == ["train/loss", "train/learning_rate", "train/grad_norm"]
    assert "_hparams_/session_start_info" in own.summary_metadata


def test_a_change_of_nodes_is_logged_whatever_log_every_is(tmp_path):
    with MetricsWriter(tmp_path, max_steps=20, first_step=1, log_every=10) as metrics:
        for step in range(1, 8):
            line = {"step": step, "loss": 1.0, "learning_rate": 0.1, "tokens_per_s": 1.0}
            metrics.step(line | ({"nodes": {"view": 2}} if step == 4 else {}), {})
    assert [(line["step"], line.get("nodes")) for line in read_metrics(tmp_path)] == [(1, None), (4, {"view": 2})]
