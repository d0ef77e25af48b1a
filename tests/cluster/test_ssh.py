"""launch/ssh.sh over a real sshd on hosts of their own: one job, and every host ends, whatever happens to one."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
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
    """Two hosts with an sshd each, and what calls ssh.sh on them."""

    def __init__(self, folder: Path):
        self.folder, self.network = folder, Network(["h0", "h1"])

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
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which a service would have made
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
            [str(ROOT / "launch" / "ssh.sh"), str(path), *map(str, arguments)], cwd=self.folder,
            env=process_env(env | settings), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def run(self, hostfile: str, *arguments: object, **settings: str) -> tuple[int, str]:
        """Exit status and output."""
        started = self.start(hostfile, *arguments, **settings)
        output, _ = started.communicate(timeout=120)
        return started.returncode, output

    def launcher(self, host: str) -> int:
        """The process id of the launcher on a host."""
        found = [pid for pid in self.network.pids(host) if "ptune_dist.cluster" in command_of(pid)]
        assert len(found) == 1
        return found[0]

    def are_idle(self) -> bool:
        """Nothing of a job runs on any host."""
        return not any(
            "ptune_dist" in command_of(pid) for host in self.network.hosts for pid in self.network.pids(host)
        )


def command_of(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return shlex.join(psutil.Process(pid).cmdline())
    return ""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("ssh")) as hosts:
        yield hosts


BOTH = "# the first is the head\nh0 slots=1\n\nh1 slots=1  # rented\n"


def wait_until(condition, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_steps(run: Path, number: int) -> None:
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= number, 60)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.mark.long
def test_two_hosts_learn_what_one_learns_and_each_line_names_its_host(hosts, tmp_path):
    config = write_config(tmp_path / "config.json")
    code, output = hosts.run(BOTH, config)
    assert code == 0, output
    assert all(line.startswith(("h0: ", "h1: ")) for line in output.splitlines()), output
    assert output.count("finished: ") == 1
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} >= {"h0.log"}
    alone = run_command("train", config, f"output_dir={tmp_path}/one")
    assert alone.returncode == 0, alone.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert hosts.are_idle()


def test_a_mistake_in_the_config_is_said_once_and_ends_with_2(hosts, tmp_path):
    config = write_config(tmp_path / "config.json", train={"max_stepz": 3})
    code, output = hosts.run(BOTH, config)
    assert code == 2 and output.count("max_stepz") == 1, output
    assert "Traceback" not in output


def test_a_host_that_is_not_there_ends_the_others(hosts, tmp_path):
    config, began = write_config(tmp_path / "config.json"), time.monotonic()
    absent = hosts.network.addresses["h0"].rpartition(".")[0] + ".77"
    code, output = hosts.run(f"h0 slots=1\n{absent} slots=1\n", config)
    assert code == 255 and f"{absent}: ssh: connect to host {absent}" in output, output
    assert time.monotonic() - began < 30
    wait_until(hosts.are_idle, 5)


@pytest.mark.long
def test_ctrl_c_saves_on_every_host_and_a_killed_ssh_sh_leaves_none_running(hosts, tmp_path):
    config, run = write_config(tmp_path / "config.json", train={"max_steps": 100_000}), tmp_path / "run"
    started = hosts.start(BOTH, config)
    wait_for_steps(run, 3)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to ssh and sed too
    output, _ = started.communicate(timeout=30)
    assert started.returncode == 75 and "stopped at step" in output, output
    status = read_status(run)
    assert status["state"] == "stopped" and status["step"] >= 3, status

    started = hosts.start(BOTH, config)
    wait_for_steps(run, status["step"] + 3)
    started.kill()
    wait_until(hosts.are_idle, 30)
    assert read_status(run)["state"] == "stopped" and read_status(run)["step"] > status["step"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == read_status(run)["step"]


@pytest.mark.long
def test_a_host_whose_launcher_is_killed_ends_the_others_and_gives_its_status(hosts, tmp_path):
    config, run = write_config(tmp_path / "config.json", train={"max_steps": 100_000}), tmp_path / "run"
    started = hosts.start(BOTH, "--max-restarts", "0", config)
    wait_for_steps(run, 3)
    os.kill(hosts.launcher("h1"), signal.SIGKILL)
    output, _ = started.communicate(timeout=40)
    assert started.returncode == 255, output  # ssh tells no signal
    assert read_status(run)["state"] == "failed" and read_status(run)["node"] == "h1", read_status(run)
    wait_until(hosts.are_idle, 30)
