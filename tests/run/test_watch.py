"""A rank is asked to stop, hangs, or ends: what its watch remembers, and what it leaves behind. No torch."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ptune_dist.cluster.signs import End, ask_to_stop, read_beats, read_ends
from ptune_dist.errors import NodeFault, RunFault, UserError
from ptune_dist.run.status import read_status
from ptune_dist.run.watch import Watch, describe_error, leave_word, status_of_failure
from tests.processes import ROOT

REQUESTS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A launcher's folder."""
    found = tmp_path / "node"
    found.mkdir()
    monkeypatch.setenv("PTUNE_NODE_FOLDER", str(found))
    monkeypatch.setenv("PTUNE_NODE_NAME", "n1")
    monkeypatch.setenv("RANK", "3")
    return found


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("PTUNE_NODE_FOLDER", raising=False)


# Requests to stop


@pytest.mark.parametrize("number", REQUESTS)
def test_a_signal_during_the_steps_is_a_request(alone, tmp_path, number):
    with Watch(0, 600) as watch:
        watch.begin_steps(tmp_path)
        assert not watch.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # again at once: from torchrun and from the terminal
        assert watch.requested


def test_before_the_steps_ctrl_c_ends_and_a_schedulers_signal_is_a_request(alone, tmp_path):
    with Watch(0, 600) as watch:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert watch.requested
    with pytest.raises(KeyboardInterrupt), Watch(0, 600):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_after_a_while(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("ptune_dist.run.watch.SECONDS_BETWEEN_INTERRUPTS", 0.05)
    with pytest.raises(KeyboardInterrupt), Watch(0, 600) as watch:
        watch.begin_steps(tmp_path)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # of these as many as one likes
        os.kill(os.getpid(), signal.SIGINT)


def test_the_launchers_file_is_a_request(folder, tmp_path):
    with Watch(3, 600) as watch:
        watch.begin_steps(tmp_path)
        assert not watch.requested
        ask_to_stop(folder)
        assert watch.requested


def test_the_handlers_of_before_come_back(alone):
    before = [signal.getsignal(number) for number in REQUESTS]
    with Watch(0, 600):
        assert [signal.getsignal(number) for number in REQUESTS] != before
    assert [signal.getsignal(number) for number in REQUESTS] == before


# Signs of life


def test_the_next_sign_is_due_within_the_loading_at_first_and_within_the_hang_timeout_later(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("PTUNE_LOAD_TIMEOUT_S", "100")
    with Watch(3, 7.0) as watch:
        for beat, wanted in ((lambda: None, 100), (watch.beat, 100), (lambda: watch.beat(5), 7), (watch.beat, 7)):
            beat()
            (found,) = read_beats(folder)
            assert found.deadline - found.at == pytest.approx(wanted)
        assert (found.rank, found.step, found.pid) == (3, 5, os.getpid())
        watch.begin_steps(tmp_path)
    assert (folder / "rank-00003.txt").read_text() == ""
    assert not (tmp_path / "stacks").exists()  # the launcher's folder has them


def test_without_a_hang_timeout_no_sign_is_ever_overdue(folder):
    with Watch(3, 0) as watch:
        watch.beat(1)
        (found,) = read_beats(folder)
        assert found.deadline - found.at > 365 * 86400


def test_a_normal_end_leaves_no_empty_stacks(alone, tmp_path):
    with Watch(1, 600) as one:
        one.begin_steps(tmp_path)
        with Watch(0, 600) as zero:
            zero.begin_steps(tmp_path)
        assert [path.name for path in (tmp_path / "stacks").iterdir()] == ["rank-00001.txt"]
    assert not (tmp_path / "stacks").exists()


def test_an_end_by_an_error_leaves_no_empty_stacks_either(alone, tmp_path):
    with pytest.raises(ValueError), Watch(0, 600) as watch:
        watch.begin_steps(tmp_path)
        raise ValueError
    assert not (tmp_path / "stacks").exists()


def run_rank(body: str, folder, *, then=lambda process: None) -> subprocess.Popen:
    """A process that watches itself over `body`; `then` is called with it once it has said "ready"."""
    script = (
        "import sys, time, os\nfrom pathlib import Path\nfrom ptune_dist.run.watch import Watch\n"
        + textwrap.dedent(body)
    )
    env = {k: v for k, v in os.environ.items() if k != "PTUNE_NODE_FOLDER"} | {"PTUNE_LOAD_TIMEOUT_S": "60"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    then(process)
    process.stdout.read()
    process.wait(20)
    return process


HANGING = """
    def stuck_in_a_collective():
        time.sleep(60)

    with Watch(1, {timeout}) as watch:
        watch.begin_steps(Path(sys.argv[1]))
        print("ready", flush=True)
        watch.beat(1)
        stuck_in_a_collective()
"""


def test_without_a_launcher_a_hang_ends_with_1_and_its_stack_is_in_the_run(tmp_path):
    began = time.monotonic()
    assert run_rank(HANGING.format(timeout=1.0), tmp_path).returncode == 1
    assert 1 < time.monotonic() - began < 15
    stack = (tmp_path / "stacks" / "rank-00001.txt").read_text()
    assert stack.startswith("Timeout (0:00:01)!") and "stuck_in_a_collective" in stack


def test_an_orphan_saves_or_is_ended_after_a_while(tmp_path):
    """Its launcher is dead, and the ranks with which it would agree may be too."""
    body = """
    import ptune_dist.run.watch
    ptune_dist.run.watch.SECONDS_TO_SAVE_ALONE = 1.0
    if os.fork():
        time.sleep(1)
        os._exit(0)
    with Watch(0, 600) as watch:
        watch.begin_steps(Path(sys.argv[1]))
        print("ready", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.01)
        os.kill(os.getpid(), 15)
        print("requested" if watch.requested else "not requested", flush=True)
        time.sleep(60)
        print("still there", flush=True)
    """
    said = []
    run_rank(body, tmp_path, then=lambda process: said.append(process.stdout.read()))  # until the orphan is gone
    assert said == ["requested\n"]
    assert "Timeout" in (tmp_path / "stacks" / "rank-00000.txt").read_text()


# Last words


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (UserError("c.yaml: no\n such key"), End("mistake", "c.yaml: no such key")),
        (RunFault("disk full"), End("fault", "disk full")),
        (NodeFault("slow", "n7"), End("fault", "slow", node="n7")),
        (KeyboardInterrupt(), End("ended", "interrupted")),
        (ZeroDivisionError("by zero"), End("error", "ZeroDivisionError: by zero")),
        (RuntimeError(), End("error", "RuntimeError: RuntimeError")),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), End("lost")),
        (RuntimeError("NCCL error: ncclRemoteError"), End("lost")),
    ],
)
def test_each_exception_has_its_word(error, end):
    found = describe_error(error)
    assert found.kind == end.kind and found.node == end.node
    assert not end.reason or found.reason == end.reason


@pytest.mark.parametrize(("status", "kind"), [(0, "done"), (75, "stopped")])
def test_a_rank_leaves_word_of_a_known_end_and_has_status_0_under_a_launcher(folder, status, kind):
    assert leave_word(lambda: status) == 0
    (end,) = read_ends(folder).values()
    assert (end.kind, end.rank, end.node) == (kind, 3, "n1")


def test_a_rank_leaves_word_of_an_exception_and_raises_it(folder):
    def fail():
        raise NodeFault("slow network at node n7", "n7")

    with pytest.raises(NodeFault):
        leave_word(fail)
    assert read_ends(folder)[3] == End("fault", "slow network at node n7", 3, "n7")  # the node that is meant


def test_without_a_launcher_the_status_is_the_words(alone):
    assert [leave_word(lambda status=status: status) for status in (0, 75)] == [0, 75]


def test_a_node_folder_that_is_gone_costs_only_the_word(folder):
    folder.rmdir()
    assert leave_word(lambda: 0) == 0


def test_what_fails_under_the_runs_lock_is_in_its_status(tmp_path):
    with pytest.raises(RunFault), status_of_failure(tmp_path):
        raise RunFault("the loss is nan at step 3")
    found = read_status(tmp_path)
    assert (found["state"], found["kind"], found["reason"]) == ("failed", "fault", "the loss is nan at step 3")


def test_that_a_rank_has_lost_another_is_for_its_launcher_to_explain(tmp_path, folder):
    with pytest.raises(RuntimeError), status_of_failure(tmp_path):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert read_status(tmp_path) == {}


def test_where_the_launcher_is_dead_nobody_else_says_that_a_rank_was_lost(tmp_path, folder, monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setenv("PTUNE_LAUNCHER_PID", str(ended.pid))
    with pytest.raises(RuntimeError), status_of_failure(tmp_path):
        raise RuntimeError("Connection closed by peer")
    assert read_status(tmp_path)["kind"] == "lost"
