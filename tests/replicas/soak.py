"""A soak test: random events on nodes that train one run as replicas, which must leave no trace in it.

    python -m tests.replicas.soak --events 100 --seed 1 --out docs/benchmarks/node_soak.json --document docs/clusters.md

Each node is on a network of its own, and the last one has two ranks. Nodes are killed, asked to stop, cut from the
others, frozen and slowed down, and new ones are started in the place of lost ones; several events may overlap, but one
node at least is well at any time. In the end the run is compared with that of one undisturbed node: every step has one
line, and all losses, the final prompt and the optimizer are bitwise the same. Needs root.
"""

import argparse
import heapq
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.replicas.hosts import Host, Hosts
from tests.replicas.nodes import VALIDATION, ZERO3, Cluster, Node, train_alone
from tests.replicas.soak_result import Ended, Event, add_costs, compare, describe, render, write
from tests.replicas.step_times import StepTimes

NUM_CALM = 15  # steps at the beginning, from which the usual time of a step follows
STALL_TIMEOUT_S = 4
PATIENCE_S = 240.0  # for a step, or for a node to be back
MAX_S = 3600
SECTIONS: dict[str, Any] = {
    "train": {
        "batch_size": 512,
        "num_blocks": 16,
        "micro_batch_tokens": 512,
        "schedule": "cosine",
        "stall_timeout_s": STALL_TIMEOUT_S,
    },
    "deepspeed": ZERO3,
    "checkpoint": {"every": 20},
    "data": VALIDATION,
    "evaluate": {"every": 50, "max_examples": 8, "num_samples": 0},
}
# How often each happens; a join as often as there are places for it.
WEIGHTS = {"kill": 2, "leave": 2, "short cut": 1, "long cut": 1, "cut of a pair": 1, "stall": 2, "slow": 2, "join": 3}


def draw_kinds(choose: random.Random, num_events: int, num_hosts: int) -> list[str]:
    """Kinds of events in an order in which there always are two nodes at least."""
    kinds: list[str] = []
    num_present = num_hosts
    for _ in range(num_events):
        weights = WEIGHTS | {"join": WEIGHTS["join"] * (num_hosts - num_present)}
        if num_present == 2:
            weights |= {"kill": 0, "leave": 0, "cut of a pair": 0}
        kinds += choose.choices(list(weights), list(weights.values()))
        num_present += {"join": 1, "kill": -1, "leave": -1}.get(kinds[-1], 0)
    return kinds


class Soak:
    """One run, and what has happened to it."""

    def __init__(self, folder: Path, hosts: Hosts, kinds: list[str], *, num_steps: int, seed: int):
        self.hosts = hosts
        self.random = random.Random(seed)
        self.kinds = kinds
        self.num_steps = num_steps
        self.sections = SECTIONS | {"train": SECTIONS["train"] | {"max_steps": num_steps}}
        self.cluster = Cluster(folder / "disturbed", **self.sections)
        self.times = StepTimes(self.cluster.run / "metrics.jsonl")
        self.events: list[Event] = []
        self.ended: list[Ended] = []
        self.began = time.monotonic()
        self._undisturbed = folder / "undisturbed"
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._leaving: list[Host] = []
        self._disturbed: dict[str, Callable[[], bool]] = {}  # hosts, and whether their nodes are well again

    def run_all(self, report: Callable[[str], None] = print) -> dict[str, Any]:
        """Cause all events and compare the run with an undisturbed one. Raises AssertionError."""
        hosts = list(self.hosts.all.values())
        for host in hosts:
            host.start(self.cluster, MAX_S)
        self.wait(lambda: self.times.members == {host.node.name for host in hosts if host.node}, "all nodes together")
        self.wait(lambda: self.times.num_since_change > NUM_CALM, "a calm beginning")
        due = sorted(self.random.uniform(self.times.step, 0.9 * self.num_steps) for _ in self.kinds)
        for kind, step in zip(self.kinds, due, strict=True):
            self.wait(lambda step=step: self.times.step >= int(step), f"step {int(step)}")
            self.sleep((step % 1) * self.times.usual_s)
            self.cause(kind)
            assert self.times.step < self.num_steps, f"the run ended after {len(self.events)} events: give more --steps"
            event = self.events[-1]
            report(f"{event.at - self.began:6.1f} s, step {event.step}: {kind} {' '.join(event.nodes)} {event.details}")
        self.wait(lambda: self.times.step == self.num_steps and not self._leaving, "the end")
        for host in hosts:
            if node := host.node:
                self.wait(lambda node=node: node.has_ended, f"the end of {node.name}")
                self.finish(host, {0})
        alone = train_alone(self._undisturbed, num_ranks=2, max_s=MAX_S, **self.sections)
        add_costs(self.events, self.times, self.cluster)
        return compare(self.cluster, alone, self.ended)

    # What happens meanwhile

    def tick(self) -> None:
        self.times.read()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()
        for host in [host for host in self._leaving if host.node and host.node.has_ended]:
            self._leaving.remove(host)
            self.finish(host, {75} if self.times.step < self.num_steps else {0, 75})
        for name in [name for name, is_well in self._disturbed.items() if is_well()]:
            del self._disturbed[name]
        for host in self.hosts.all.values():
            is_at_work = host.node and host not in self._leaving and self.times.step < self.num_steps
            assert not (is_at_work and host.node and host.node.has_ended), tell(host.node)

    def wait(self, is_so: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        self.tick()
        while not is_so():
            now = time.monotonic()
            is_stuck = now - max(began, self.times.last_at) > PATIENCE_S
            assert not is_stuck, f"waited for {what}\n" + "\n".join(tell(host.node) for host in self.hosts.all.values())
            time.sleep(0.01)
            self.tick()

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= end, "a moment")

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, len(self.events), action))

    def finish(self, host: Host, codes: set[int]) -> None:
        """A node has ended, as it should."""
        node = host.node
        assert node
        found = node.finish()
        assert found <= codes, f"{node.name} ended with {found}: {tell(node)}"
        self.ended.append(Ended(node.name, found, node.output))
        host.node = None

    def well(self) -> list[Host]:
        """Hosts whose nodes train undisturbed."""
        hosts = [host for host in self.hosts.all.values() if host not in self._leaving]
        hosts = [host for host in hosts if host.node and host.node.name in self.times.members]
        return [host for host in hosts if host.name not in self._disturbed]

    # The events

    def cause(self, kind: str) -> None:
        if kind == "join":
            self.wait(lambda: any(host.node is None for host in self.hosts.all.values()), "a place for a node")
            return self.join(self.random.choice([host for host in self.hosts.all.values() if host.node is None]))
        number = 2 if kind == "cut of a pair" else 1
        self.wait(lambda: len(self.well()) > number, f"{number + 1} nodes that are well")
        chosen = self.random.sample(self.well(), number)
        {
            "kill": self.kill,
            "leave": self.leave,
            "short cut": lambda host: self.cut(host, self.random.uniform(0.5, 3)),
            "long cut": lambda host: self.cut(host, self.random.uniform(5, 10)),
            "cut of a pair": self.cut_pair,
            "stall": self.stall,
            "slow": self.slow,
        }[kind](*chosen)

    def note(self, kind: str, *hosts: Host, **details: Any) -> Event:
        names = [host.node.name for host in hosts if host.node]
        self.events.append(Event(kind, names, time.monotonic(), self.times.step, details))
        return self.events[-1]

    def join(self, host: Host) -> None:
        node = host.start(self.cluster, MAX_S)
        self.expect_back(self.note("join", host), host, node)

    def kill(self, host: Host) -> None:
        self.note("kill", host)
        assert host.node
        host.node.kill()
        self.finish(host, {-signal.SIGKILL})

    def leave(self, host: Host) -> None:
        self.note("leave", host)
        assert host.node
        host.node.send(self.random.choice((signal.SIGTERM, signal.SIGUSR2)))
        self._leaving.append(host)

    def cut(self, host: Host, seconds: float) -> None:
        event = self.note("short cut" if seconds < 4 else "long cut", host, for_s=round(seconds, 1))
        self.hosts.network.unplug(host.name)
        self.disturb(event, [host], seconds, lambda: self.hosts.network.plug(host.name))

    def cut_pair(self, one: Host, other: Host) -> None:
        seconds = self.random.uniform(2, 10)
        event = self.note("cut of a pair", one, other, for_s=round(seconds, 1))
        self.hosts.network.cut(one.name, other.name)
        self.disturb(event, [one, other], seconds, lambda: self.hosts.network.heal(one.name, other.name))

    def stall(self, host: Host) -> None:
        """One of its ranks: another than that which talks to the other nodes may be frozen."""
        node = host.node
        assert node
        rank = self.random.randrange(len(node.ranks))
        seconds = self.random.uniform(5, 9)
        event = self.note("stall", host, rank=rank, for_s=round(seconds, 1))
        node.send(signal.SIGSTOP, rank)
        self.disturb(event, [host], seconds, lambda: node.send(signal.SIGCONT, rank))

    def slow(self, host: Host) -> None:
        seconds = self.random.uniform(8, 15)
        share = self.random.choice((0.1, 0.2))
        event = self.note("slow", host, share=share, for_s=round(seconds, 1))
        host.slow_down(share)
        self.disturb(event, [host], seconds, host.speed_up)

    def disturb(self, event: Event, hosts: list[Host], seconds: float, end: Callable[[], None]) -> None:
        """Call `end` after some seconds. From then on the nodes are expected to be among those that train."""
        for host in hosts:
            self._disturbed[host.name] = lambda: False

        def restore() -> None:
            end()
            event.details["healed_step"] = self.times.step
            for host in hosts:
                assert host.node
                self.expect_back(event, host, host.node)

        self.later(seconds, restore)

    def expect_back(self, event: Event, host: Host, node: Node) -> None:
        began = time.monotonic()
        step = self.times.step

        def is_well() -> bool:
            waited_s = time.monotonic() - began
            is_back = node.name in self.times.members and self.times.step >= min(step + 2, self.num_steps)
            is_over = self.times.step == self.num_steps
            assert is_back or is_over or waited_s < PATIENCE_S, f"{node.name} does not come back\n{tell(node)}"
            if is_back:
                event.details["back_s"] = round(max(waited_s, event.details.get("back_s", 0)), 1)
                event.details["back_step"] = self.times.step
            return is_back

        self._disturbed[host.name] = is_well


def tell(node: Node | None) -> str:
    return f"--- {node.name}\n{node.output[-3000:]}" if node else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--nodes", type=int, default=4, help="3 at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the result, a JSON file")
    parser.add_argument("--document", type=Path, help="the page whose block of it is filled")
    parser.add_argument("--keep", type=Path, help="a new folder for the run, which is kept; else it is removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        names = [f"n{number}" for number in range(args.nodes)]
        kinds = draw_kinds(random.Random(args.seed), args.events, args.nodes)
        with Hosts({name: 1 + (name == names[-1]) for name in names}) as hosts:
            soak = Soak(folder, hosts, kinds, num_steps=args.steps, seed=args.seed)
            agreement = soak.run_all(lambda line: print(line, flush=True))
    settings = {"seed": args.seed, "num_nodes": args.nodes, "num_calm_steps": NUM_CALM}
    settings |= {"num_blocks": SECTIONS["train"]["num_blocks"], "wall_s": round(time.monotonic() - soak.began)}
    content = describe(soak.events, soak.ended, soak.times, agreement, settings)
    print(render(content))
    write(content, args.out, args.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
