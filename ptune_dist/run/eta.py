"""When a run will end: from its steps and its evaluations, which are timed apart."""

import time
from dataclasses import dataclass, field


@dataclass
class Eta:
    """Call `count_step` after each step and `count_evaluation` after each evaluation; both measure since the last call.

    The first step of a process compiles and fills caches, so it counts only until there is another one.
    """

    max_steps: int
    evaluate_every: int  # 0: only at the end
    steps_s: float = 0.0
    num_steps: int = 0
    evaluations_s: float = 0.0
    num_evaluations: int = 0
    _mark: float = field(default_factory=lambda: time.monotonic())

    def _lap(self) -> float:
        now = time.monotonic()
        seconds = now - self._mark
        self._mark = now
        return seconds

    def count_step(self) -> None:
        seconds = self._lap()
        self.num_steps += 1
        self.steps_s = seconds if self.num_steps <= 2 else self.steps_s + seconds

    def count_evaluation(self) -> None:
        self.evaluations_s += self._lap()
        self.num_evaluations += 1

    def left_s(self, done: int) -> float:
        """Seconds until the end, after `done` steps of the run."""
        of_step = self.steps_s / max(1, self.num_steps - 1)
        of_evaluation = self.evaluations_s / max(1, self.num_evaluations)
        return of_step * (self.max_steps - done) + of_evaluation * self._evaluations_left(done)

    def _evaluations_left(self, done: int) -> int:
        if not self.evaluate_every:
            return int(done < self.max_steps)
        # Those due at multiples in [done, max_steps), and the one at the end. The one at `done` has not begun.
        multiples = (self.max_steps - 1) // self.evaluate_every - (done - 1) // self.evaluate_every
        return multiples + 1
