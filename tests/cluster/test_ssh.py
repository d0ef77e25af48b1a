"""launch/ssh.sh over a real sshd on separate hosts: one job, and all hosts stop, whatever happens to one."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ptune_dist.run.metrics_log import read_metrics
from ptune_dist.run.status import read_status
from tests.cluster.network import Network
from tests.commands import run_command
from tests.conftest import write_config
from tests.processes import ROOT, process_env

SSHD = Path("/usr/sbin/sshd")
pytestmark = pytest.mark.skipif(not SSHD.exists(), reason="needs openssh-server (tests/cluster/install.sh)")

SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/client_key.pub
PidFile none
StrictModes no
UsePAM no
"""
SSH_CONFIG = """
Host *
  User root
  IdentityFile {folder}/client_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SITE = "HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu"


class Hosts:
    """Two hosts with an sshd each, on which ssh.sh starts jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.network = Network(["h0", "h1"])

    def __enter__(self) -> "Hosts":
        for name in ("host_key", "client_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True)
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        text = SSH_CONFIG.format(folder=self.folder)
        self.network.build()
        for host, address in self.network.addresses.items():
            text += f"Host {host}\n  HostName {address}\n"
        (self.folder / "ssh_config").write_text(text)
        (self.folder / "site.sh").write_text(SITE.replace(" ", "\n") + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)  # which a service would have created for sshd
        for host in self.network.hosts:
            self.network.start(host, [SSHD, "-D", "-e", "-f", self.folder / "sshd_config"], {}, self.folder / host)
        return self

    def __exit__(self, *_: object) -> None:
        self.network.remove()

    def start(self, hostfile: str, *arguments: object, **settings: str) -> subprocess.Popen:
        path = self.folder / "hostfile"
        path.write_text(hostfile)
        env = {
            "PTUNE_SSH": f"ssh -F {self.folder}/ssh_config",
            "PTUNE_SITE": str(self.folder / "site.sh"),
            "PTUNE_PYTHON": sys.executable,
        }
        return subprocess.Popen(
            [str(ROOT / "launch" / "ssh.sh"), str(path), *map(str, arguments)],
            cwd=self.folder,
            env=process_env(env | settings),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, hostfile: str, *arguments: object, **settings: str) -> tuple[int, str]:
        """Exit status and output."""
        started = self.start(hostfile, *arguments, **settings)
        output, _ = started.communicate(timeout=120)
        return started.returncode, output

    def launchers(self, host: str) -> list[int]:
        """The process ids of the launchers on a host."""
        return [pid for pid in self.network.pids(host) if "-m ptune_dist.cluster" in command_of(pid)]

    def are_idle(self) -> bool:
        """Whether no process of a job runs on any host."""
        pids = [pid for host in self.network.hosts for pid in self.network.pids(host)]
        return not any("ptune_dist" in command_of(pid) for pid in pids)


def command_of(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return shlex.join(psutil.Process(pid).cmdline())
    return ""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("ssh")) as hosts:
        yield hosts


BOTH = "# the first is the head\nh0 slots=1\n\nh1 slots=1  # rented\n"


def wait_until(is_true: Callable[[], bool], seconds: float) -> None:
    give_up_at = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def wait_for_steps(run: Path, number: int) -> None:
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= number, 90)


def read_losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


# With ranks


@pytest.mark.long
def test_two_hosts_learn_the_same_as_one_and_ctrl_c_saves_on_both(hosts: Hosts, tmp_path: Path):
    config = write_config(tmp_path / "config.json", train={"max_steps": 100_000, "schedule": "constant"})
    run = tmp_path / "run"
    started = hosts.start(BOTH, config)
    wait_for_steps(run, 20)
    os.killpg(started.pid, signal.SIGINT)  # like a terminal: ssh and sed receive it as well
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 75 and output.count("stopped at step") == 1, output
    assert all(line.startswith(("h0: ", "h1: ")) for line in output.splitlines()), output
    assert {path.name for path in (run / "logs").iterdir()} >= {"h0.log"}
    status = read_status(run)
    assert status["state"] == "stopped" and status["step"] == len(read_losses(run)) >= 20, status
    alone = run_command("train", config, f"output_dir={tmp_path}/alone", "train.max_steps=20")
    assert alone.returncode == 0, alone.stderr
    assert read_losses(run)[:20] == pytest.approx(read_losses(tmp_path / "alone"), rel=1e-5)
    assert hosts.are_idle()


# Without ranks


@pytest.fixture
def waiting(hosts: Hosts, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A job whose launchers run, but start no ranks: another process holds the lock of the run."""
    config = write_config(tmp_path / "config.json")
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = hosts.start(BOTH, config)
        wait_until(lambda: bool(hosts.launchers("h0") and hosts.launchers("h1")), 30)
        yield started
        started.kill()
        started.wait()


def test_a_killed_ssh_sh_stops_every_host(hosts: Hosts, waiting: subprocess.Popen):
    waiting.kill()
    wait_until(hosts.are_idle, 30)


def test_a_killed_launcher_stops_the_other_hosts_and_gives_its_status(hosts: Hosts, waiting: subprocess.Popen):
    (launcher,) = hosts.launchers("h1")
    os.kill(launcher, signal.SIGKILL)
    output, _ = waiting.communicate(timeout=40)
    assert waiting.returncode == 255, output  # ssh does not report signals
    wait_until(hosts.are_idle, 30)


def test_a_mistake_in_the_config_is_reported_once_and_ends_with_2(hosts: Hosts, tmp_path: Path):
    config = write_config(tmp_path / "config.json", train={"max_stepz": 3})
    code, output = hosts.run(BOTH, config)
    assert code == 2 and output.count("max_stepz") == 1, output
    assert "Traceback" not in output


def test_a_missing_host_stops_the_others(hosts: Hosts, tmp_path: Path):
    config = write_config(tmp_path / "config.json")
    began = time.monotonic()
    absent = hosts.network.addresses["h0"].rpartition(".")[0] + ".77"
    code, output = hosts.run(f"h0 slots=1\n{absent} slots=1\n", config)
    assert code == 255 and f"{absent}: ssh: connect to host {absent}" in output, output
    assert time.monotonic() - began < 30
    wait_until(hosts.are_idle, 5)
