"""Hosts that are far from each other, on slow links, with a part of a core each: what replicas may be.

`relay.py` stands where the bridge of a `Network` is, and delays every frame. The kernel limits the rate at which each
host sends (tbf) and the processor time of its processes (cgroup v1, whose `cpu` hierarchy must be mounted).
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.network import Network, run
from tests.processes import ROOT

CGROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000  # short beside the delays that are measured: a process out of quota waits for the next period
BURST = "4kb"  # what a link takes at once above its rate; it must hold a frame


def find_obstacle() -> str:
    """Why a SlowNetwork cannot be built here, or ""."""
    if os.geteuid() != 0:
        return "it needs root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    if not (CGROUPS / "cpu.cfs_quota_us").exists():
        return f"there is no cgroup v1 with quotas at {CGROUPS}"
    return ""


class SlowNetwork(Network):
    """A context manager. `rate` is tc's, such as 10mbit, of what each host sends."""

    def __init__(self, hosts: list[str], rate: str, delay_s: float):
        super().__init__(hosts)
        self._rate = rate
        self._delay_s = delay_s
        self._relay: subprocess.Popen[str]

    def __enter__(self) -> "SlowNetwork":
        self.build()
        for host in self.hosts:
            self._cgroup(host).mkdir(exist_ok=True)
            (self._cgroup(host) / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        return self

    def __exit__(self, *_: object) -> None:
        self._relay.stdin.close()
        self._relay.wait()
        self.remove()
        for host in self.hosts:
            with contextlib.suppress(TimeoutError):  # a process of it does not end
                wait_until(lambda host=host: self._is_removed(host), 10.0, "the end of a node's processes")

    def build_middle(self) -> None:
        command = [sys.executable, "-m", "tests.cluster.relay", *map(self.link, self.hosts)]
        self._relay = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        if self._relay.stdout.readline() != "ready\n":
            raise RuntimeError(f"the relay has ended with {self._relay.wait()}")
        self.set_delay(self._delay_s)

    def plug_in(self, host: str) -> None:
        namespace = self.namespace(host)
        run("ip", "link", "set", self.link(host), "netns", namespace, "name", "eth0")
        limit = ["root", "tbf", "rate", self._rate, "burst", BURST, "latency", "10s"]  # a sender waits, nothing is lost
        run("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "eth0", *limit)

    def set_delay(self, delay_s: float) -> None:
        """Of one way, of what is sent from now on."""
        self._relay.stdin.write(f"{delay_s}\n")
        self._relay.stdin.flush()

    def set_quota(self, host: str, cores: float) -> None:
        (self._cgroup(host) / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD_US)))

    def inside(self, host: str, command: list[str]) -> list[str]:
        procs = self._cgroup(host) / "cgroup.procs"  # which is out of sight inside
        return ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh", *super().inside(host, command)]

    def bytes_sent(self, host: str) -> int:
        """By the host's link since it exists, headers and all."""
        found = json.loads(run("ip", "-n", self.namespace(host), "-s", "-j", "link", "show", "dev", "eth0"))
        return found[0]["stats64"]["tx"]["bytes"]

    def _is_removed(self, host: str) -> bool:
        """A group stays for a moment after its last process."""
        with contextlib.suppress(OSError):
            self._cgroup(host).rmdir()
        return not self._cgroup(host).exists()

    def _cgroup(self, host: str) -> Path:
        return CGROUPS / self.namespace(host)


def wait_until(is_true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
