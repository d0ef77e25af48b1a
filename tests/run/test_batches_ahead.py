"""The thread that prepares batches changes nothing but the time: the order, the members and the errors are the same."""

import time
import traceback
from dataclasses import dataclass, field

import pytest
import torch

from ptune_dist.distributed.world import World
from ptune_dist.run.batches_ahead import BatchesAhead, StepPlan, StepSource

ALONE = World(0, 1, torch.device("cpu"))
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Source(StepSource):
    """Steps of three micro-batches that say what they are; `made` are those that have been prepared."""

    made: list = field(default_factory=list)
    fails_at: tuple | None = None
    seconds: float = 0.0

    def plan(self, step, live, share=None):
        def batches():
            for number in range(3):
                time.sleep(self.seconds)
                what = (step, number, tuple(live), self.micro_batch_tokens)
                if self.fails_at == (step, number):
                    raise ValueError(f"row {number} of step {step} cannot be read")
                self.made.append(what)
                yield what

        return StepPlan(step, {}, {}, 3), batches()


def build_source(**options) -> Source:
    return Source(None, None, ALONE, 100, 0, **options)


def expected(step: int, *live: str, tokens: int = 100) -> list:
    return [(step, number, live, tokens) for number in range(3)]


def take(ahead: BatchesAhead, step: int, *live: str) -> list:
    plan, batches = ahead.of_step(step, list(live))
    assert plan.step == step
    return list(batches)


def wait_for(source: Source, count: int) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while len(source.made) < count:
        assert time.monotonic() < give_up_at, source.made
        time.sleep(0.001)


def test_batches_come_in_order_and_one_is_prepared_ahead_across_steps():
    source = build_source()
    with BatchesAhead(source) as ahead:
        for step in (5, 6, 7):  # a run that is resumed
            _, batches = ahead.of_step(step, ["a", "b"])
            for number, wanted in enumerate(expected(step, "a", "b")):
                assert next(batches) == wanted
                done = 3 * (step - 5) + number + 1
                wait_for(source, done + 1)  # the next one, though nobody has asked for it
                assert len(source.made) == done + 1
            assert next(batches, None) is None


def test_members_that_end_are_in_no_later_batch():
    source = build_source()
    with BatchesAhead(source) as ahead:
        assert take(ahead, 1, "a", "b") == expected(1, "a", "b")
        wait_for(source, 4)  # the next step is being prepared for both
        assert take(ahead, 2, "b") == expected(2, "b")
        assert take(ahead, 3, "b") == expected(3, "b")


def test_another_size_holds_from_the_next_step_that_is_asked_for():
    with BatchesAhead(build_source()) as ahead:
        _, batches = ahead.of_step(1, ["a"])
        next(batches)
        ahead.resize(50)
        assert take(ahead, 1, "a") == expected(1, "a", tokens=50)
        assert take(ahead, 2, "a") == expected(2, "a", tokens=50)


def test_an_error_of_the_thread_is_raised_where_its_batch_would_be_taken():
    with BatchesAhead(build_source(fails_at=(2, 1))) as ahead:
        assert take(ahead, 1, "a") == expected(1, "a")
        _, batches = ahead.of_step(2, ["a"])
        assert next(batches) == expected(2, "a")[0]
        with pytest.raises(ValueError, match="row 1 of step 2") as caught:
            next(batches)
    assert "in batches" in "".join(traceback.format_exception(caught.value))  # where in the thread


def test_leaving_waits_for_nothing():
    with BatchesAhead(build_source(seconds=0.3)) as ahead:
        ahead.of_step(1, ["a"])
        began = time.monotonic()
    assert time.monotonic() - began < 0.2
