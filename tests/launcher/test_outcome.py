"""Which of several outcomes explains the others, and the exit status of each."""

import itertools

import pytest

from ptune_dist.cluster.outcome import KINDS, RESTARTABLE, Outcome, find_cause


@pytest.mark.parametrize(
    ("kinds", "cause"),
    [
        (["lost", "killed", "lost"], "killed"),
        (["ended", "hang"], "hang"),
        (["hang", "stuck"], "stuck"),
        (["hang", "frozen"], "frozen"),  # the others wait for the frozen one
        (["error", "unreachable"], "unreachable"),
        (["stopped", "done"], "stopped"),
        (["done", "killed"], "killed"),
        (["fault", "error", "mistake"], "mistake"),
    ],
)
def test_the_cause_is_found_in_any_order(kinds: list[str], cause: str):
    for order in itertools.permutations(kinds):
        assert find_cause([Outcome(kind) for kind in order]).kind == cause


def test_among_equals_the_first_is_the_cause():
    assert find_cause([Outcome("error", "one"), Outcome("error", "two")]).reason == "one"


def test_exit_statuses():
    statuses = {kind: Outcome(kind).exit_status for kind in KINDS}
    assert {kind: status for kind, status in statuses.items() if status != 1} == {
        "done": 0,
        "stopped": 75,
        "mistake": 2,
    }
    assert all(statuses[kind] == 1 for kind in RESTARTABLE)
