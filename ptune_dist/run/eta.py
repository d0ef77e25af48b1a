"""When a run will end: from its steps and its evaluations, which are timed apart."""

import time
from dataclasses import dataclass, field


@dataclass
class Eta:
    """Call `count_steps` after each step or period of local steps, and `count_evaluation` after each evaluation.

    Both measure since the last call. The first step of a process compiles and fills caches, so it counts only until
    there is another one.
    """

    max_steps: int
    evaluate_every: int  # 0: only at the end
    steps_s: float = 0.0
    num_steps: int = 0  # that these seconds are of
    evaluations_s: float = 0.0
    num_evaluations: int = 0
    num_laps: int = 0
    _mark: float = field(default_factory=lambda: time.monotonic())

    def _lap(self) -> float:
        now = time.monotonic()
        seconds = now - self._mark
        self._mark = now
        return seconds

    def count_steps(self, number: int = 1) -> None:
        seconds = self._lap()
        self.num_laps += 1
        if self.num_laps <= 2:
            self.steps_s = 0.0
            self.num_steps = 0
        self.steps_s += seconds
        self.num_steps += number

    def count_evaluation(self) -> None:
        self.evaluations_s += self._lap()
        self.num_evaluations += 1

    def left_s(self, done: int) -> float:
        """Seconds until the end, after `done` steps of the run."""
        of_step = self.steps_s / max(1, self.num_steps)
        of_evaluation = self.evaluations_s / max(1, self.num_evaluations)
        return of_step * (self.max_steps - done) + of_evaluation * self._evaluations_left(done)

    def _evaluations_left(self, done: int) -> int:
        if not self.evaluate_every:
            return int(done < self.max_steps)
        # Those due at multiples in [done, max_steps), and the one at the end. The one at `done` has not begun.
        multiples = (self.max_steps - 1) // self.evaluate_every - (done - 1) // self.evaluate_every
        return multiples + 1
