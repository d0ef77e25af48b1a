"""A node of the tests: a process that "trains" a vector on gradients made from step, block and the vector itself.

Writes one JSON line per event to its log.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from ptune_dist.errors import RunFault, UserError
from ptune_dist.nodes.blocks import sum_along_tree
from ptune_dist.nodes.group import GroupSettings, LeftBehind, Limits, NodeGroup, OwnReport, StoppedWaiting, Todo

WIDTH = 33


def gradient(step: int, block: int, state: np.ndarray) -> np.ndarray:
    made = np.random.default_rng((step, block)).standard_normal(WIDTH)
    return (made + state * made[::-1]).astype(np.float32)


def update(state: np.ndarray, total: np.ndarray) -> np.ndarray:
    return (state * np.float32(0.98) - np.float32(0.003) * total).astype(np.float32)


def digest(state: np.ndarray) -> str:
    return hashlib.sha256(state.tobytes()).hexdigest()[:16]


def tree_sum(step: int, lo: int, hi: int, state: np.ndarray) -> np.ndarray:
    if hi - lo == 1:
        return gradient(step, lo, state)
    middle = (lo + hi) // 2
    return tree_sum(step, lo, middle, state) + tree_sum(step, middle, hi, state)


def train_alone(num_steps: int, num_blocks: int) -> list[str]:
    """What one undisturbed node computes: the digest of its state after each step."""
    state = np.zeros(WIDTH, np.float32)
    digests = []
    for step in range(1, num_steps + 1):
        state = update(state, tree_sum(step, 0, num_blocks, state))
        digests.append(digest(state))
    return digests


class Node:
    def __init__(self, options: dict):
        self.options = options
        self.log = open(options["log"], "a", buffering=1)
        self.state = np.zeros(WIDTH, np.float32)
        self.step = 1
        self.folder = Path(options["folder"])
        self.stop_file = Path(options["log"] + ".stop")

    def write(self, event: str, **facts) -> None:
        self.log.write(json.dumps({"event": event, "at": time.time(), "name": self.options["name"], **facts}) + "\n")

    def is_stopping(self) -> bool:
        return self.stop_file.exists()

    def settings(self) -> GroupSettings:
        keys = ("name", "secret", "listen", "advertise", "min_nodes", "max_nodes", "run", "folder")
        where = self.options["rendezvous"]
        return GroupSettings(
            rendezvous=Path(where) if "/" in where else where,
            limits=Limits(**self.options.get("limits", {})),
            **{key: self.options[key] for key in keys if key in self.options},
        )

    def take_over(self, joined) -> None:
        if joined.snapshot is None:
            saved = self.folder / "checkpoint.json"
            data = json.loads(saved.read_text()) if saved.exists() else {"step": 1, "state": [0.0] * WIDTH}
            self.step = data["step"]
            self.state = np.array(data["state"], np.float32)
        else:
            self.step = joined.step
            self.state = np.frombuffer(joined.snapshot, np.float32).copy()
        self.write("entered", step=self.step, is_founder=joined.snapshot is None, digest=digest(self.state))

    def wait_for_go(self) -> None:
        while "go" in self.options and not Path(self.options["go"]).exists():
            time.sleep(0.01)

    def save(self) -> None:
        temporary = self.folder / f".checkpoint-{os.getpid()}"
        temporary.write_text(json.dumps({"step": self.step, "state": self.state.tolist()}))
        temporary.replace(self.folder / "checkpoint.json")
        self.write("saved", step=self.step)

    def finish(self) -> None:
        time.sleep(self.options.get("save_s", {}).get(self.options["name"], 0.0))
        self.save()

    def compute(self, ranges) -> dict[tuple, bytes]:
        done = {}
        for piece in ranges:
            time.sleep(self.options.get("block_s", 0.0) * piece.num_blocks)
            done[piece] = tree_sum(self.step, piece.lo, piece.hi, self.state).tobytes()
        return done

    def train_step(self, group: NodeGroup) -> bool:
        """Returns whether training continues."""
        step = self.step
        todo = Todo(tuple(group.begin_step(step, self.state.tobytes, self.is_stopping)))
        started = time.monotonic()
        if self.options.get("hang_at", {}).get(self.options["name"]) == step:
            time.sleep(self.options["hang_s"])
        pieces = self.compute(todo.redo)
        own_digest = digest(self.state)
        if self.options.get("diverge_at", {}).get(self.options["name"]) == step:
            own_digest = "another"
        report = OwnReport(time.monotonic() - started, self.is_stopping(), own_digest, {"name": self.options["name"]})
        group.deliver(step, pieces, report)
        while not (todo := group.wait(step)).is_complete:
            self.write("redo", step=step, ranges=[[piece.lo, piece.hi] for piece in todo.redo])
            group.deliver(step, self.compute(todo.redo))
        cover = {piece: np.frombuffer(data, np.float32) for piece, data in group.cover(step).items()}
        self.state = update(self.state, sum_along_tree(cover, np.add, self.options["num_blocks"]))
        agreed = group.end_step(step)
        counts = {
            member.name: sum(piece.num_blocks for piece in agreed.owners.get(member.id, ()))
            for member in agreed.members
        }
        self.step += 1
        self.write("step", step=step, digest=digest(self.state), view=agreed.view_number, blocks=counts)
        if step % self.options.get("save_every", 10**9) == 0 and group.view.is_writer:
            self.save()
        if agreed.is_last:
            group.finish(self.finish)
            return False
        if agreed.is_leaving:
            group.leave()
            return False
        if step == self.options["num_steps"]:
            group.finish(self.finish)
            return False
        return True

    def run(self) -> None:
        with NodeGroup(self.settings(), lambda text: self.write("say", text=text)) as group:
            needs_entry = True
            while True:
                try:
                    if needs_entry:
                        self.take_over(group.enter(self.options["num_blocks"], self.is_stopping))
                        needs_entry = False
                        self.wait_for_go()
                    if self.step > self.options["num_steps"]:
                        group.finish(self.finish)
                        break
                    if not self.train_step(group):
                        break
                except LeftBehind as left:
                    self.write("left behind", why=str(left))
                    needs_entry = True
                except StoppedWaiting as stopped:
                    if stopped.is_last:
                        group.finish(self.finish)
                    break
        self.write("end", digest=digest(self.state), step=self.step)


def main(options: dict, environment: dict[str, str], errors: str) -> None:
    """The process of a node."""
    os.environ.update(environment)
    sys.stderr = open(errors, "a", buffering=1)
    try:
        Node(options).run()
    except (UserError, RunFault) as error:
        sys.exit(f"error: {error}")
