"""Random events on nodes that train: whatever happens, each step ends as on one undisturbed node."""

import os
import random
import signal
import time

import pytest

from tests.nodes.nodes import Nodes

EVENTS = ("kill", "kill two", "leave", "join", "pause", "stall", "cut one", "cut a pair")


class Soak:
    """Three to five nodes. Each event is over before the next, or nearly so, as in real life or worse."""

    def __init__(self, nodes: Nodes, seed: int):
        self.nodes = nodes
        self.random = random.Random(seed)
        self.num_started = 0
        self.present: list[str] = []
        self.done: list[str] = []

    def join(self) -> None:
        name = f"n{self.num_started}"
        self.num_started += 1
        self.nodes.start(name, has_relay=True)
        self.present.append(name)

    def disturb(self) -> None:
        event = self.random.choice(EVENTS)
        chosen = self.random.sample(self.present, 2)
        self.done.append(f"{event} {' '.join(chosen)}")
        if event in ("kill", "kill two"):
            for name in chosen[: 2 if event == "kill two" else 1]:
                self.nodes.kill(name)
                self.present.remove(name)
                time.sleep(self.random.choice((0.0, 0.0, 0.1, 0.3)))
        elif event == "leave":
            self.nodes.stop(chosen[0])
            self.present.remove(chosen[0])
        elif event in ("pause", "stall"):
            self.nodes.kill(chosen[0], signal.SIGSTOP)
            time.sleep(self.random.uniform(0.1, 1.0) if event == "pause" else 4.0)
            self.nodes.kill(chosen[0], signal.SIGCONT)
        elif event in ("cut one", "cut a pair"):
            self.nodes.cut(chosen[0], set(self.present) if event == "cut one" else {chosen[1]})
            time.sleep(self.random.uniform(0.5, 5.0))
            self.nodes.cut(chosen[0], set())
        while len(self.present) < 3 or (event == "join" and len(self.present) < 5):
            self.join()
            event = ""
        time.sleep(self.random.uniform(0.0, 1.0))


def soak(folder, seed: int, num_events: int, num_steps: int) -> None:
    with Nodes(folder, num_steps=num_steps, block_s=0.01, save_every=10) as nodes:
        run = Soak(nodes, seed)
        for _ in range(3):
            run.join()
        nodes.wait_until(lambda: all(nodes.events(name, "step") for name in run.present))
        for _ in range(num_events):
            if any(nodes.processes[name].exitcode is not None for name in run.present):
                break  # the run is over
            run.disturb()
        try:
            nodes.wait_for_end(*run.present, seconds=60 + num_steps * 0.3)
            nodes.check(*run.present, is_whole=False)
            nodes.check(*(name for name in nodes.processes if name not in run.present), is_whole=False)
            last = max(nodes.last_step(name) for name in run.present)
            assert last == num_steps
            assert nodes.longest_standstill() < 20
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, after {run.done}\n{error}") from None


@pytest.mark.long
def test_a_few_random_events(tmp_path):
    soak(tmp_path, int(os.environ.get("PTUNE_TEST_SEED", "1")), num_events=4, num_steps=100)


@pytest.mark.extended
@pytest.mark.parametrize("seed", range(3))
def test_many_random_events(tmp_path, seed):
    soak(tmp_path, seed, num_events=40, num_steps=1500)
