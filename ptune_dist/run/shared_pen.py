"""Who writes the run's folder where nodes train as replicas: one of them, and another where it is lost.

Every node makes what is to be written, since all have the same state. The writer writes it; the others keep it until
later steps are complete: the writer's part of a step came after it had written what belongs to the steps before. Where
the writer is lost, the next one writes what it has kept, and the folder is what it would have been.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ptune_dist.common.progress_line import render_duration
from ptune_dist.common.writes import Write
from ptune_dist.errors import RunFault
from ptune_dist.run.eta import Eta
from ptune_dist.run.metrics_log import Listener, MetricsWriter

NUM_KEPT_STEPS = 3
NUM_NOTES = 100
SECONDS_BETWEEN_LINES = 60.0  # of a node that does not write, on its console
BY_ANOTHER = "another node writes the run's folder"


class SharedPen:
    """Called with what writes into the run's folder: done at once by the writer, kept by the others."""

    def __init__(self) -> None:
        self.is_writer = False
        self._kept: list[list[Write]] = [[]]  # since the last steps

    def __call__(self, write: Write) -> None:
        if self.is_writer:
            write()
        else:
            self._kept[-1].append(write)

    def take(self) -> None:
        """This node is the writer from now on: it writes what it has kept."""
        kept = [write for of_step in self._kept for write in of_step]
        self._kept = [[]]
        self.is_writer = True
        for write in kept:
            write()

    def pass_on(self) -> None:
        """Another node is the writer from now on."""
        self.is_writer = False
        self._kept = [[]]

    def forget(self) -> None:
        """A step is complete: drop what the writer has surely written. A second one may be lost as it takes over."""
        self._kept = [*self._kept[1 - NUM_KEPT_STEPS :], []]


class SharedLog:
    """A `MetricsWriter` that is open on the writer alone. On rank 0 of each node."""

    def __init__(self, open_writer: Callable[[int], MetricsWriter], pen: SharedPen, first_step: int, eta: Eta):
        """`open_writer` gets the first step that is written: lines of it and of later ones are replaced.

        eta: counted while another node writes too, so that it is right where this one takes over.
        """
        self._open_writer = open_writer
        self._pen = pen
        self._next_step = first_step
        self._writer: MetricsWriter | None = None
        self._notes: deque[tuple[int, str]] = deque(maxlen=NUM_NOTES)  # each with the step that was to come
        self.eta = eta
        self._shown_at = -math.inf
        self.listener: Listener | None = None

    def __enter__(self) -> "SharedLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kind, error, trace)

    def close(self, *error: Any) -> None:
        """Another node is the writer, or the run is over."""
        writer = self._writer
        self._writer = None
        if writer is not None:
            writer.__exit__(*(error or (None, None, None)))

    @property
    def failure(self) -> RunFault | None:
        """A write that has failed."""
        return self._writer.failure if self._writer else None

    def step(self, line: dict[str, Any], members: dict[str, dict[str, float]]) -> None:
        step = int(line["step"])
        self._pen(lambda: self._open(step).step(line, members))
        self._next_step = step + 1
        if not self._pen.is_writer and time.monotonic() - self._shown_at > SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            left = render_duration(self.eta.left_s(step))
            print(f"step {step}/{self.eta.max_steps}  loss {line['loss']:.4f}  ETA {left}  ({BY_ANOTHER})", flush=True)

    def evaluation(
        self, step: int, metrics: dict[str, float], samples: list[dict[str, str]], member: str | None = None
    ) -> None:
        self._pen(lambda: self._open(step).evaluation(step, metrics, samples, member))

    def without_prompt(self, metrics: dict[str, float]) -> None:
        self._pen(lambda: self._open(0).without_prompt(metrics))

    def ranks(self, step: int, ranks: list[dict[str, Any]]) -> None:
        self._pen(lambda: self._open(step).ranks(step, ranks))

    def say(self, text: str) -> None:
        """A line for the console of this node, and for the log where it is the writer."""
        if self._pen.is_writer:
            self._open(self._next_step).say(text)
        else:
            print(text, flush=True)

    def tell(self, text: str) -> None:
        """A line about nodes: in the log too where this node becomes the writer because of what it tells."""
        self.say(text)
        if not self._pen.is_writer:
            self._notes.append((self._next_step, text))

    def continue_from(self, step: int) -> None:
        """The node has taken over the others' state, as of after `step`."""
        self._next_step = step + 1

    def _open(self, first_step: int) -> MetricsWriter:
        if self._writer is None:
            self._writer = self._open_writer(max(1, first_step)).__enter__()
            self._writer.listener = self.listener
            self._writer.eta = self.eta
            for step, text in self._notes:
                if step >= first_step:  # the writer before has written what was told earlier
                    self._writer.note(text)
            self._notes.clear()
        return self._writer


Log = MetricsWriter | SharedLog
