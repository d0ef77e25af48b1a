"""launch/ssh.sh reads the same hostfiles as DeepSpeed's own launcher, and refuses the same ones."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import write_config
from tests.processes import ROOT, process_env

GOOD = [
    "worker-1 slots=8\nworker-2 slots=8\n",
    "# my hosts\n\n  worker-1   slots=2\nworker-2\tslots=4   # rented\n\n",
    "me@10.0.0.1 slots=1\n10.0.0.2 slots=1",  # no newline at the end
    "only slots=16\n",
]
BAD = [
    ("worker-1 slots=8\nworker-2\n", "line 2: 'worker-2' is not 'HOST slots=NUMBER'"),
    ("worker-1 slots=eight\n", "line 1"),
    ("\n\nworker-1 slots = 8\n", "line 3"),
    ("slots=8\n", "line 1"),
    ("worker-1 slots=8\nworker-2 slots=8\nworker-1 slots=4\n", "names worker-1 twice"),
    ("# none\n\n", "names no host"),
    ("", "names no host"),
]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs ssh.sh with a program in place of ssh that prints what it is given; returns exit status and output."""
    fake = tmp_path / "fake-ssh"
    fake.write_text('#!/bin/bash\nshift 9\necho "$1 gets $2"\n')  # skips -T and four options
    fake.chmod(0o755)

    def run(text: str, *arguments: str) -> tuple[int, str]:
        (tmp_path / "hostfile").write_text(text)
        command = [str(ROOT / "launch" / "ssh.sh"), str(tmp_path / "hostfile"), *(arguments or ["c.yaml"])]
        env = process_env({"PTUNE_SSH": str(fake)})
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20)
        return done.returncode, done.stdout + done.stderr

    return run


def parse_as_deepspeed(text: str) -> dict[str, int]:
    from deepspeed.launcher.runner import _parse_hostfile

    return dict(_parse_hostfile(text.splitlines()))


@pytest.mark.parametrize("text", GOOD)
def test_hosts_and_slots_are_those_that_deepspeed_finds(start: Callable[..., tuple[int, str]], text: str):
    code, output = start(text)
    assert code == 0, output
    found = {}
    for line in output.splitlines():
        host, _, command = line.partition(": ")[2].partition(" gets ")
        found[host] = int(command.partition("PTUNE_PROCS=")[2].split()[0])
    assert found == parse_as_deepspeed(text)


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_deepspeed_refuses_is_refused_with_its_line(
    start: Callable[..., tuple[int, str]], text: str, message: str
):
    code, output = start(text)
    assert code == 2 and message in output and output.count("\n") == 1
    with pytest.raises(ValueError):
        parse_as_deepspeed(text)


def test_hosts_get_the_command_as_it_was_typed(start: Callable[..., tuple[int, str]]):
    code, output = start("a slots=1\nme@b slots=1\n", "--check", "my config.yaml", "data.template='{{ a }}: $HOME'")
    assert code == 0
    for rank, line in enumerate(sorted(output.splitlines())):
        name, command = line.split(": ", 1)
        assert name == "ab"[rank] and f"PTUNE_NODE_RANK={rank} " in command and "PTUNE_NODE_NAMES=a\\,b" in command
        assert "PTUNE_HEAD_ADDRESS=a " in command
        echo = command.replace("exec env", "echo").partition(" && ")[2]
        typed = subprocess.run(["bash", "-c", echo], capture_output=True)
        assert typed.stdout.decode().endswith("run.sh --check my config.yaml data.template='{{ a }}: $HOME'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["no-hosts", "c.yaml"], "no-hosts: no such file"), (["no-hosts"], "usage: launch/ssh.sh")],
)
def test_a_missing_hostfile_or_config_is_a_mistake(tmp_path: Path, arguments: list[str], message: str):
    command = [str(ROOT / "launch" / "ssh.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_the_status_of_the_first_failure_is_returned(tmp_path: Path):
    fake = tmp_path / "fake-ssh"
    # Host a exits with 75 when its input ends, as a launcher that saves; host b fails after a while.
    fake.write_text('#!/bin/bash\nif [ "${10}" = a ]; then cat; exit 75; else sleep 0.3; exit 7; fi\n')
    fake.chmod(0o755)
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    command = [str(ROOT / "launch" / "ssh.sh"), str(tmp_path / "hostfile"), "c.yaml"]
    done = subprocess.run(command, env=process_env({"PTUNE_SSH": str(fake)}), timeout=20)
    assert done.returncode == 7


@pytest.mark.parametrize("nodes, code, has_finished", [("one_world", 7, False), ("replicas", 0, True)])
def test_replicas_continue_without_a_host_that_fails(tmp_path: Path, nodes: str, code: int, has_finished: bool):
    fake = tmp_path / "fake-ssh"
    fake.write_text(
        "#!/bin/bash\n"
        "for last; do :; done\n[[ $last = *PTUNE_NODE_RANK=0* ]] && exit 7\n"
        "read -r -t 3 _; [ $? -gt 128 ] && echo finished\n"  # the input ends when the hosts are to stop
    )
    fake.chmod(0o755)
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    config = write_config(tmp_path / "c.yaml", train={"max_steps": 3, "nodes": nodes})
    command = [str(ROOT / "launch" / "ssh.sh"), str(tmp_path / "hostfile"), str(config)]
    env = process_env({"PTUNE_SSH": str(fake)})
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "b: finished" in done.stdout) == (code, has_finished), done.stdout + done.stderr
