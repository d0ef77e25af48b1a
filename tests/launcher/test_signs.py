"""What a rank leaves for its launcher: signs of life, last words; and which of several words explains the others."""

import itertools
import os
import subprocess
import sys
import time

import pytest

from ptune_dist.cluster.signs import (
    KINDS,
    WORTH_A_RESTART,
    Beat,
    BeatFile,
    End,
    ask_to_stop,
    first_cause,
    is_asked_to_stop,
    own_folder,
    read_beats,
    read_ends,
    stack_file,
    write_end,
)
from tests.processes import process_env


def test_the_last_sign_of_each_rank_is_read(tmp_path):
    first, second = BeatFile(tmp_path, 3), BeatFile(tmp_path, 12)
    assert read_beats(tmp_path) == []  # none has given one
    second.write(0, 600)
    first.write(1, 60)
    first.write(2, 60)
    (beat, other) = read_beats(tmp_path)
    assert (beat.rank, beat.pid, beat.step) == (3, os.getpid(), 2)
    assert beat.at == pytest.approx(time.monotonic(), abs=5) and beat.deadline == beat.at + 60
    assert (other.rank, other.step, other.deadline - other.at) == (12, 0, 600)


def test_a_torn_file_is_no_sign(tmp_path):
    (tmp_path / "rank-00000.beat").write_bytes(b"\x01" * 31)
    assert read_beats(tmp_path) == []


def test_a_sign_costs_microseconds(tmp_path):
    file, began = BeatFile(tmp_path, 0), time.perf_counter()
    for step in range(1000):
        file.write(step, 60)
    assert time.perf_counter() - began < 0.5
    assert [beat.step for beat in read_beats(tmp_path)] == [999]


def test_last_words_come_in_the_order_in_which_they_were_said(tmp_path):
    for rank, kind in ((2, "error"), (0, "lost"), (1, "lost")):
        write_end(tmp_path, End(kind, f"of rank {rank}: ä", rank, "n0"))
        time.sleep(0.02)
    assert list(read_ends(tmp_path)) == [2, 0, 1]
    assert read_ends(tmp_path)[2] == End("error", "of rank 2: ä", 2, "n0")
    assert not list(tmp_path.glob(".*"))


def test_a_request_to_stop_is_a_file(tmp_path):
    assert not is_asked_to_stop(tmp_path)
    ask_to_stop(tmp_path)
    ask_to_stop(tmp_path)
    assert is_asked_to_stop(tmp_path)


def test_without_a_launcher_there_is_no_folder(tmp_path, monkeypatch):
    for value, wanted in ((None, None), ("", None), (str(tmp_path), tmp_path)):
        monkeypatch.delenv("PTUNE_NODE_FOLDER", raising=False)
        if value is not None:
            monkeypatch.setenv("PTUNE_NODE_FOLDER", value)
        assert own_folder() == wanted
    assert stack_file(tmp_path, 7).name == "rank-00007.txt"


@pytest.mark.parametrize(
    ("kinds", "cause"),
    [
        (["lost", "killed", "lost"], "killed"),
        (["ended", "hang"], "hang"),
        (["hang", "stuck"], "stuck"),
        (["hang", "frozen"], "frozen"),  # the others wait for the one that is stopped
        (["error", "unreachable"], "unreachable"),
        (["stopped", "done"], "stopped"),
        (["done", "killed"], "killed"),
        (["fault", "error", "mistake"], "mistake"),
    ],
)
def test_the_cause_explains_the_others_in_whatever_order_they_come(kinds, cause):
    for order in itertools.permutations(kinds):
        assert first_cause([End(kind) for kind in order]).kind == cause


def test_of_one_kind_the_first_word_counts():
    assert first_cause([End("error", "one"), End("error", "two")]).reason == "one"


def test_exit_statuses():
    statuses = {kind: End(kind).status for kind in KINDS}
    assert {kind: status for kind, status in statuses.items() if status != 1} == {
        "done": 0,
        "stopped": 75,
        "mistake": 2,
    }
    assert all(statuses[kind] == 1 for kind in WORTH_A_RESTART)


def test_a_beat_is_32_bytes(tmp_path):
    BeatFile(tmp_path, 0).write(1, 1)
    assert (tmp_path / "rank-00000.beat").stat().st_size == 32
    assert isinstance(read_beats(tmp_path)[0], Beat)


def test_a_sign_is_never_seen_half_written(tmp_path):
    """By another process: a reader that saw a zero would end a healthy job."""
    script = (
        "import sys, pathlib\nfrom ptune_dist.cluster.signs import BeatFile\n"
        "file = BeatFile(pathlib.Path(sys.argv[1]), 0)\n"
        "while True:\n    file.write(3, 5.0)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=process_env())
    try:
        until = time.monotonic() + 20
        while not read_beats(tmp_path):
            assert time.monotonic() < until
        for _ in range(10_000):
            (beat,) = read_beats(tmp_path)
            assert beat.pid == writer.pid and beat.step == 3 and beat.deadline > beat.at > 1
    finally:
        writer.kill()
        writer.wait()
