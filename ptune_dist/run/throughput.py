"""Throughput: samples and tokens per second in the steady state."""

import time
from typing import NamedTuple

NUM_WARM_UP_STEPS = 5  # not counted in throughput


class StepCount(NamedTuple):
    """What one optimizer step took and processed."""

    seconds: float
    num_samples: int
    num_tokens: int
    num_gathers: int = 0  # of weights, by this rank
    gathered_bytes: int = 0  # received by this rank
    gathered_bytes_between_nodes: int = 0


class Throughput:
    """Counts the steps of this process; means leave its first steps out."""

    def __init__(self) -> None:
        self._steps: list[StepCount] = []
        self._lap_began = time.monotonic()

    def count(self, step: StepCount) -> None:
        self._steps.append(step)

    def lap(self) -> float:
        """Seconds since the last call, or since construction."""
        began = self._lap_began
        self._lap_began = time.monotonic()
        return self._lap_began - began

    @property
    def last(self) -> StepCount:
        return self._steps[-1]

    @property
    def samples_per_s(self) -> float:
        return self._per_second("num_samples")

    @property
    def tokens_per_s(self) -> float:
        return self._per_second("num_tokens")

    def per_step(self, what: str) -> float:
        """The mean of a field of StepCount, 0 before the first step."""
        steady = self._steady()
        return sum(getattr(step, what) for step in steady) / len(steady) if steady else 0.0

    def _per_second(self, what: str) -> float:
        return self.per_step(what) / self.per_step("seconds") if self._steps else 0.0

    def _steady(self) -> list[StepCount]:
        return self._steps[NUM_WARM_UP_STEPS:] or self._steps
