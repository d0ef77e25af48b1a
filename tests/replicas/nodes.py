"""Nodes that train one run as replicas: each is a world of its own, started by hand as a job array would start them."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.commands import Started, run_command, start_ranks, wait_for_ranks
from tests.conftest import TINY, write_config

MAX_S = 240.0
NUM_BLOCKS = 8
ZERO3 = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 100, "stage3_param_persistence_threshold": 0}}


@dataclass
class Node:
    """The ranks of one node, as they were started."""

    name: str
    ranks: list[Started] = field(default_factory=list)

    def kill(self) -> None:
        """As a machine that loses its power."""
        self.send(signal.SIGKILL)

    def stop(self) -> None:
        """As a scheduler that asks the node to stop."""
        self.send(signal.SIGTERM)

    def send(self, number: int, *ranks: int) -> None:
        """ranks: which of them get the signal; all by default."""
        for rank in [self.ranks[each] for each in ranks] or self.ranks:
            os.kill(rank.pid, number)

    @property
    def has_ended(self) -> bool:
        return all(is_ended(rank.pid) for rank in self.ranks)

    def finish(self) -> set[int]:
        """The exit statuses of its ranks."""
        return set(wait_for_ranks(self.ranks))

    def wait_for_line(self, text: str) -> None:
        """Until the node has told something."""
        give_up_at = time.monotonic() + MAX_S
        while text not in self.output:
            assert time.monotonic() < give_up_at and not self.has_ended, self.output[-2000:]
            time.sleep(0.05)

    @property
    def output(self) -> str:
        files = [file for rank in self.ranks for file in (rank.out, rank.err) if file.exists()]
        return "".join(file.read_text() for file in files)


def is_ended(pid: int) -> bool:
    """Whether a child of a forker has ended, whose status nobody has asked for."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


class Cluster:
    """Starts nodes of one run, whose folder they share."""

    def __init__(self, folder: Path, num_ranks: int = 1, **sections: Any):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.run = folder / "run"
        self.num_ranks = num_ranks
        train = {"max_steps": 30, "batch_size": 16, "learning_rate": 0.02, "micro_batch_tokens": 1024}
        train |= {"nodes": "replicas", "num_blocks": NUM_BLOCKS} | sections.pop("train", {})
        checkpoint = {"every": 10, "keep": 100} | sections.pop("checkpoint", {})
        self.config = write_config(folder / "config.json", train=train, checkpoint=checkpoint, **sections)
        self.num_started = 0

    def start(
        self,
        name: str,
        *overrides: str,
        num_ranks: int = 0,
        env: dict[str, str] | None = None,
        max_s: float = MAX_S,
        network: str = "",
    ) -> Node:
        """num_ranks: where the node has another number of them. network: the namespace that it is in."""
        self.num_started += 1
        own = self.folder / f"{self.num_started}-{name}"
        own.mkdir()
        argv = ["train", str(self.config), *overrides]
        env = {"PTUNE_NODE_NAME": name} | (env or {})
        num_ranks = num_ranks or self.num_ranks
        return Node(name, start_ranks("ptune_dist", argv, own, num_ranks, timeout=max_s, env=env, network=network))

    def wait_for_step(self, step: int) -> None:
        """Until a step is logged."""
        give_up_at = time.monotonic() + MAX_S
        metrics = self.run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
            assert time.monotonic() < give_up_at, [p.read_text()[-2000:] for p in self.folder.glob("*/*.err")]
            time.sleep(0.005)

    def wait_for_member(self, name: str) -> None:
        """Until a node computes blocks of a step that is logged."""
        self.wait_for_view(lambda found: name in found["blocks"])

    def wait_for_view(self, is_wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Until the latest of `history` is as wanted."""
        give_up_at = time.monotonic() + MAX_S
        while not (found := self.history()) or not is_wanted(found[-1]):
            assert time.monotonic() < give_up_at, [p.read_text()[-2000:] for p in self.folder.glob("*/*.err")]
            time.sleep(0.01)

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, which may be being written."""
        text = (self.run / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines()]

    def history(self) -> list[dict[str, Any]]:
        """Who computed what, of the steps in which that changed."""
        return [{"step": line["step"], **line["nodes"]} for line in self.lines() if "nodes" in line]

    def final(self) -> list[bytes]:
        last = sorted((self.run / "checkpoints").glob("step-*"))[-1]
        return [(last / name).read_bytes() for name in ("prompt.safetensors", "optimizer.safetensors")]

    def status(self) -> dict[str, Any]:
        return json.loads((self.run / "status.json").read_text())


def train_alone(folder: Path, *overrides: str, num_ranks: int = 1, max_s: float = MAX_S, **sections: Any) -> Cluster:
    """A run of one node."""
    cluster = Cluster(folder, num_ranks, **sections)
    done = run_command("train", str(cluster.config), *overrides, num_ranks=num_ranks, timeout=max_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return cluster


VALIDATION = {"validation": str(TINY / "data" / "validation.jsonl")}
