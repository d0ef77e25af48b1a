"""What a rank's watch does when the rank is asked to stop, hangs or ends. Without torch."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from ptune_dist.cluster.outcome import Outcome
from ptune_dist.cluster.rank_files import read_heartbeats, read_outcomes, request_stop
from ptune_dist.errors import NodeFault, RunFault, UserError
from ptune_dist.run.status import read_status
from ptune_dist.run.watch import Watch, describe_error, describe_kept, failure_in_status, report_outcome
from tests.processes import ROOT, process_env

REQUESTS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this rank's launcher."""
    path = tmp_path / "node"
    path.mkdir()
    monkeypatch.setenv("PTUNE_NODE_FOLDER", str(path))
    monkeypatch.setenv("PTUNE_NODE_NAME", "n1")
    monkeypatch.setenv("RANK", "3")
    return path


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher."""
    monkeypatch.delenv("PTUNE_NODE_FOLDER", raising=False)


# Requests to stop


@pytest.mark.parametrize("number", REQUESTS)
def test_a_signal_during_the_steps_is_a_request(alone: None, tmp_path: Path, number: int):
    with Watch(0, 600) as watch:
        watch.begin_steps(tmp_path)
        assert not watch.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # again, as from both torchrun and the terminal
        assert watch.requested


def test_before_the_steps_ctrl_c_ends_and_a_schedulers_signal_is_a_request(alone: None):
    with Watch(0, 600) as watch:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert watch.requested
    with pytest.raises(KeyboardInterrupt), Watch(0, 600):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_after_a_while(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ptune_dist.run.watch.SECONDS_BETWEEN_INTERRUPTS", 0.05)
    with pytest.raises(KeyboardInterrupt), Watch(0, 600) as watch:
        watch.begin_steps(tmp_path)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)  # which never ends, however often it comes
        os.kill(os.getpid(), signal.SIGINT)


def test_after_a_second_ctrl_c_the_line_names_what_is_left(tmp_path: Path):
    assert describe_kept(tmp_path).endswith("the same command starts again: there is no checkpoint yet")
    code = f"""
        import os, signal, time
        from pathlib import Path
        from ptune_dist.common.interrupts import listen
        from ptune_dist.run import watch
        listen()
        watch.SECONDS_BETWEEN_INTERRUPTS = 0.05
        with watch.Watch(0, 600) as watched:
            watched.begin_steps(Path({str(tmp_path)!r}))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    """
    newest = tmp_path / "checkpoints" / "step-00000007"
    newest.mkdir(parents=True)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, env=process_env(), capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == f"interrupted a second time; the same command continues from {newest}\n"


def test_the_launchers_file_is_a_request(folder: Path, tmp_path: Path):
    with Watch(3, 600) as watch:
        watch.begin_steps(tmp_path)
        assert not watch.requested
        request_stop(folder)
        assert watch.requested


def test_the_previous_handlers_are_restored(alone: None):
    before = [signal.getsignal(number) for number in REQUESTS]
    with Watch(0, 600):
        assert [signal.getsignal(number) for number in REQUESTS] != before
    assert [signal.getsignal(number) for number in REQUESTS] == before


# Heartbeats


def test_heartbeats_are_due_within_the_load_timeout_and_then_within_the_hang_timeout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PTUNE_LOAD_TIMEOUT_S", "100")
    with Watch(3, 7.0) as watch:
        assert seconds_to_deadline(folder) == pytest.approx(100)
        watch.beat()
        assert seconds_to_deadline(folder) == pytest.approx(100)
        watch.beat(5)
        assert seconds_to_deadline(folder) == pytest.approx(7)
        watch.beat()
        assert seconds_to_deadline(folder) == pytest.approx(7)
        (found,) = read_heartbeats(folder)
        assert (found.rank, found.step, found.pid) == (3, 5, os.getpid())
        watch.begin_steps(tmp_path)
    assert (folder / "rank-00003.txt").read_text() == ""
    assert not (tmp_path / "stacks").exists()  # they are in the launcher's folder


def seconds_to_deadline(folder: Path) -> float:
    """Between a rank's latest heartbeat and the next."""
    (found,) = read_heartbeats(folder)
    return found.deadline - found.at


def test_without_a_hang_timeout_no_heartbeat_is_ever_overdue(folder: Path):
    with Watch(3, 0) as watch:
        watch.beat(1)
        assert seconds_to_deadline(folder) > 365 * 86400


def test_a_normal_end_leaves_no_empty_stacks(alone: None, tmp_path: Path):
    with Watch(1, 600) as one:
        one.begin_steps(tmp_path)
        with Watch(0, 600) as zero:
            zero.begin_steps(tmp_path)
        assert [path.name for path in (tmp_path / "stacks").iterdir()] == ["rank-00001.txt"]
    assert not (tmp_path / "stacks").exists()


def test_an_error_leaves_no_empty_stacks_either(alone: None, tmp_path: Path):
    with pytest.raises(ValueError), Watch(0, 600) as watch:
        watch.begin_steps(tmp_path)
        raise ValueError
    assert not (tmp_path / "stacks").exists()


def run_rank(body: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of a process that runs `body`, which uses Watch and first prints "ready"."""
    script = (
        "import sys, time, os\nfrom pathlib import Path\nfrom ptune_dist.run.watch import Watch\n"
        + textwrap.dedent(body)
    )
    env = {k: v for k, v in os.environ.items() if k != "PTUNE_NODE_FOLDER"} | {"PTUNE_LOAD_TIMEOUT_S": "60"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout.readline() == "ready\n"
    output = process.stdout.read()  # ends with the last process that holds the pipe
    return process.wait(20), output


HANGING = """
    def stuck_in_a_collective():
        time.sleep(60)

    with Watch(1, {timeout}) as watch:
        watch.begin_steps(Path(sys.argv[1]))
        print("ready", flush=True)
        watch.beat(1)
        stuck_in_a_collective()
"""


def test_without_a_launcher_a_hang_ends_with_1_and_its_stack_is_in_the_run(tmp_path: Path):
    began = time.monotonic()
    status, _ = run_rank(HANGING.format(timeout=1.0), tmp_path)
    assert status == 1
    assert 1 < time.monotonic() - began < 15
    stack = (tmp_path / "stacks" / "rank-00001.txt").read_text()
    assert stack.startswith("Timeout (0:00:01)!") and "stuck_in_a_collective" in stack


def test_an_orphan_that_cannot_save_is_ended_after_a_while(tmp_path: Path):
    """Its launcher is dead, and the ranks with which it would agree to stop may be dead as well."""
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
    _, output = run_rank(body, tmp_path)
    assert output == "requested\n"
    assert "Timeout" in (tmp_path / "stacks" / "rank-00000.txt").read_text()


# Outcomes


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UserError("c.yaml: no\n such key"), Outcome("mistake", "c.yaml: no such key")),
        (RunFault("disk full"), Outcome("fault", "disk full")),
        (NodeFault("slow", "n7"), Outcome("fault", "slow", node="n7")),
        (KeyboardInterrupt(), Outcome("ended", "interrupted")),
        (ZeroDivisionError("by zero"), Outcome("error", "ZeroDivisionError: by zero")),
        (RuntimeError(), Outcome("error", "RuntimeError: RuntimeError")),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), Outcome("lost")),
        (RuntimeError("NCCL error: ncclRemoteError"), Outcome("lost")),
        (RuntimeError("NCCL communicator was aborted on rank 1. "), Outcome("lost")),
        (RuntimeError("NCCL error: remote process exited or there was a network error, NCCL"), Outcome("lost")),
        (RuntimeError("ncclSystemError: System call (e.g. socket, malloc) or external library"), Outcome("lost")),
        (RuntimeError("A call failed possibly due to a network error or a remote process exiting"), Outcome("lost")),
        (RuntimeError("ncclInvalidUsage: This usually reflects invalid usage of NCCL"), Outcome("error")),
    ],
)
def test_each_exception_has_its_outcome(error: BaseException, outcome: Outcome):
    found = describe_error(error)
    assert found.kind == outcome.kind and found.node == outcome.node
    assert not outcome.reason or found.reason == outcome.reason


# As torch 2.13, cuBLAS and NCCL write them.
CUDA_OOM = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB is free. "
    "Including non-PyTorch memory, this process has 77.89 GiB memory in use."
)
NCCL_OOM = "ncclUnhandledCudaError: Call to CUDA function failed. Last error: Cuda failure 2 'out of memory'"


def test_a_lack_of_host_memory_in_python_is_a_fault_too(folder: Path):
    found = describe_error(MemoryError())
    assert found.kind == "fault" and found.reason.startswith("rank 3 on node n1 ran out of memory: lower train.")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            CUDA_OOM,
            "rank 3 on node n1 ran out of GPU memory (tried to allocate 2.50 GiB): lower train.micro_batch_tokens",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "rank 3 on node n1 ran out of GPU ",
        ),
        (NCCL_OOM, "rank 3 on node n1 ran out of GPU memory: lower train.micro_batch_tokens, or use more ranks"),
        (
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 45 bytes.",
            "rank 3 on node n1 ran out of mem",
        ),
    ],
)
def test_a_lack_of_memory_is_a_fault_that_names_the_key(folder: Path, text: str, reason: str):
    """Also where another rank sends it as text, and a RunFault, so that it is reported in one line."""
    for error in (torch.OutOfMemoryError(text), RuntimeError(f"Traceback\n ... torch.OutOfMemoryError: {text}")):

        def fail(error: Exception = error) -> int:
            raise error

        with pytest.raises(RunFault, match="train.micro_batch_tokens"):
            report_outcome(fail)
        (outcome,) = read_outcomes(folder).values()
        assert (outcome.kind, outcome.rank, outcome.node) == ("fault", 3, "n1")
        assert outcome.reason.startswith(reason)


def test_under_a_bare_torchrun_the_rank_that_lacks_memory_shows_its_own_error(monkeypatch: pytest.MonkeyPatch):
    """Only rank 0 reports in one line, and it may not be the one."""

    def fail() -> int:
        raise torch.OutOfMemoryError(CUDA_OOM)

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(torch.OutOfMemoryError):
        report_outcome(fail)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RunFault, match="rank 0 ran out of GPU memory"):
        report_outcome(fail)


@pytest.mark.parametrize(("status", "kind"), [(0, "done"), (75, "stopped")])
def test_under_a_launcher_a_rank_records_a_known_outcome_and_has_status_0(folder: Path, status: int, kind: str):
    assert report_outcome(lambda: status) == 0
    (outcome,) = read_outcomes(folder).values()
    assert (outcome.kind, outcome.rank, outcome.node) == (kind, 3, "n1")


def test_a_rank_records_an_exception_and_raises_it(folder: Path):
    def fail() -> int:
        raise NodeFault("slow network at node n7", "n7")

    with pytest.raises(NodeFault):
        report_outcome(fail)
    assert read_outcomes(folder)[3] == Outcome("fault", "slow network at node n7", 3, "n7")  # the node to blame


def test_without_a_launcher_the_status_is_the_functions(alone: None):
    assert report_outcome(lambda: 0) == 0
    assert report_outcome(lambda: 75) == 75


def test_a_missing_folder_costs_only_the_outcome(folder: Path):
    folder.rmdir()
    assert report_outcome(lambda: 0) == 0


def test_a_failure_under_the_runs_lock_is_in_its_status(tmp_path: Path):
    with pytest.raises(RunFault), failure_in_status(tmp_path):
        raise RunFault("the loss is nan at step 3")
    found = read_status(tmp_path)
    assert (found["state"], found["kind"], found["reason"]) == ("failed", "fault", "the loss is nan at step 3")


def test_the_loss_of_another_rank_is_left_to_the_launcher(tmp_path: Path, folder: Path):
    with pytest.raises(RuntimeError), failure_in_status(tmp_path):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert read_status(tmp_path) == {}


def test_the_loss_of_another_rank_is_in_the_status_if_the_launcher_is_dead(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setenv("PTUNE_LAUNCHER_PID", str(ended.pid))
    with pytest.raises(RuntimeError), failure_in_status(tmp_path):
        raise RuntimeError("Connection closed by peer")
    assert read_status(tmp_path)["kind"] == "lost"
