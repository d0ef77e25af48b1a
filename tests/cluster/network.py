"""Nodes on one machine: network namespaces on a bridge, with links that can be cut.

Every process of a cluster runs in one of its namespaces, and every name on the machine begins with that of the network
(`ptune3`: bridge ptune3, namespaces ptune3-n0, ...). So the name is enough to remove the whole cluster. A second
process, the janitor, does that when the test run ends in any way: it waits for the end of a pipe.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NAMESPACES = Path("/run/netns")
HOSTS = Path("/etc/netns")


def run(*command: str, check: bool = True) -> str:
    """The output of a command. Raises RuntimeError with its stderr if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """Hosts on their own bridge, each in a namespace with its host name and a hosts file that lists all of them."""

    def __init__(self, hosts: list[str]):
        claim, number = claim_number()
        self.name = f"ptune{number}"
        self.hosts = hosts
        # 198.18.0.0/15 is reserved for benchmarking networks (RFC 2544), so no machine has real neighbors there.
        self.own_address = f"198.18.{number}.254"
        self.addresses = {host: f"198.18.{number}.{i + 1}" for i, host in enumerate(hosts)}
        self.janitor = start_janitor(self.name, claim)
        claim.close()  # the janitor holds it until everything is removed
        self.cuts: set[frozenset[str]] = set()
        self.unplugged: set[str] = set()

    def build(self) -> None:
        self.build_middle()
        names = {"localhost": "127.0.0.1", **self.addresses, socket.gethostname(): self.own_address}
        for host in self.hosts:
            folder = HOSTS / self.namespace(host)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
            self.add_host(host)

    def build_middle(self) -> None:
        """What the hosts are plugged into."""
        run("ip", "link", "add", self.name, "type", "bridge")
        run("ip", "address", "add", f"{self.own_address}/24", "dev", self.name)
        run("ip", "link", "set", self.name, "up")

    def plug_in(self, host: str) -> None:
        """Give a host its eth0."""
        run("ip", "link", "add", self.link(host), "type", "veth", "peer", "eth0", "netns", self.namespace(host))
        run("ip", "link", "set", self.link(host), "master", self.name, "up")

    def add_host(self, host: str) -> None:
        inside = ["ip", "-n", self.namespace(host)]
        run("ip", "netns", "add", self.namespace(host))
        self.plug_in(host)
        run(*inside, "address", "add", f"{self.addresses[host]}/24", "dev", "eth0")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "set", "eth0", "up")

    def namespace(self, host: str) -> str:
        return f"{self.name}-{host}"

    link = namespace  # the bridge's end of the host's cable

    def start(self, host: str, command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen:
        """Run a command on a host, unaffected by Ctrl-C, which must not end daemons before their cluster."""
        with log.open("a") as output:
            return subprocess.Popen(
                self.inside(host, command),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def inside(self, host: str, command: list[str]) -> list[str]:
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host, *map(str, command)]
        return ["ip", "netns", "exec", self.namespace(host), *named]

    def pids(self, host: str) -> list[int]:
        return [int(pid) for pid in run("ip", "netns", "pids", self.namespace(host)).split()]

    def cut(self, a: str, b: str) -> None:
        """Silently drop every packet between two hosts from now on: connections stall instead of being reset.

        Each host gets a nonexistent hardware address for the other. Isolated bridge ports would cut more than one pair.
        """
        self.cuts.add(frozenset((a, b)))
        for here, there in ((a, b), (b, a)):
            lost = [self.addresses[there], "lladdr", "02:00:00:00:00:00", "dev", "eth0", "nud", "permanent"]
            run("ip", "-n", self.namespace(here), "neighbour", "replace", *lost)

    def heal(self, a: str, b: str) -> None:
        self.cuts.remove(frozenset((a, b)))
        for here, there in ((a, b), (b, a)):
            run("ip", "-n", self.namespace(here), "neighbour", "del", self.addresses[there], "dev", "eth0")

    def unplug(self, host: str) -> None:
        """Silently drop every packet from and to a host."""
        self.unplugged.add(host)
        run("ip", "link", "set", self.link(host), "down")

    def plug(self, host: str) -> None:
        self.unplugged.remove(host)
        run("ip", "link", "set", self.link(host), "up")

    def remove(self) -> None:
        """Have the janitor end every process of the network and remove it."""
        self.janitor.stdin.close()
        self.janitor.wait()


def claim_number() -> tuple[socket.socket, int]:
    """A number that no living network has, and the socket that claims it. Leftovers of dead networks are removed.

    The name of an abstract socket becomes free as soon as no process holds it, and leaves no file.
    """
    for number in left_numbers():
        claim = claim_socket(number)
        if claim:
            remove(f"ptune{number}")
            claim.close()
    for number in range(250):
        claim = claim_socket(number)
        if claim:
            return claim, number
    raise RuntimeError("250 test clusters on one machine")


def claim_socket(number: int) -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0ptune-cluster-{number}")
    except OSError:
        claim.close()
        return None
    return claim


def left_numbers() -> set[int]:
    places = (NAMESPACES, HOSTS, Path("/sys/class/net"))
    names = [entry.name for place in places if place.is_dir() for entry in place.iterdir()]
    matches = [re.fullmatch(r"ptune(\d+)(-\w+)?", name) for name in names]
    return {int(match[1]) for match in matches if match}


def remove(name: str) -> None:
    """Kill all processes in the namespaces of a network, then remove them, the bridge and the hosts files."""
    namespaces = [entry.name for entry in NAMESPACES.glob(f"{name}-*")]
    give_up_at = time.monotonic() + 20
    left = find_pids(namespaces)
    while left:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > give_up_at:
            print(f"{name}: these processes do not end: {left}", file=sys.stderr)
            break
        time.sleep(0.05)
        left = find_pids(namespaces)
    for each in namespaces:
        run("ip", "link", "del", each, check=False)
        run("ip", "netns", "del", each, check=False)
    run("ip", "link", "del", name, check=False)
    for folder in HOSTS.glob(f"{name}-*"):
        shutil.rmtree(folder)
    if HOSTS.is_dir() and not any(HOSTS.iterdir()):
        HOSTS.rmdir()


def find_pids(namespaces: list[str]) -> list[int]:
    return [int(pid) for each in namespaces for pid in run("ip", "netns", "pids", each, check=False).split()]


def start_janitor(name: str, claim: socket.socket) -> subprocess.Popen:
    """A process that removes the network once this one closes its stdin or dies. Until then it holds the claim."""
    return subprocess.Popen(
        [sys.executable, __file__, name],
        stdin=subprocess.PIPE,
        pass_fds=[claim.fileno()],
        start_new_session=True,
    )


if __name__ == "__main__":
    sys.stdin.read()
    remove(sys.argv[1])
