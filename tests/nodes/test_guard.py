"""A node with another state is found; one that only rounds differently is not."""

import pytest
import torch

from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.blocks import Range
from ptune_dist.nodes.guard import find_differing
from ptune_dist.nodes.turns import Arrived, Plan
from ptune_dist.run.node_state import mark
from tests.nodes.nodes import Nodes


def report(digest: str, kind: str = "A100", decisions: str = "best at 5", marks=((10.0, 2.0),)) -> dict:
    return {"digest": digest, "kind": kind, "decisions": decisions, "marks": [list(each) for each in marks]}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([report("1"), report("1"), report("2")], {"c"}),
        ([report("1"), report("2"), report("2")], {"a"}),  # one kind: most of them are right
        ([report("1"), report("2")], {"b"}),
        ([report("1"), {"digest": ""}, report("1", "H100")], set()),
        ([report("1"), report("2"), report("3", "H100", marks=[(10.001, 2.001)])], set()),
        ([report("1"), report("2", "H100", marks=[(10.1, 2.0)])], {"b"}),
        ([report("1"), report("2", "H100", marks=[(10.0, 2.1)])], {"b"}),
        ([report("1"), report("2", "H100", marks=[(float("nan"), 2.0)])], {"b"}),
        ([report("1"), report("2", "H100", "best at 10"), report("3", "H100")], {"b"}),
        ([report("1", marks=()), report("2", "H100", marks=())], set()),  # the step in which the kinds become known
        ([report("1"), report("2", "H100", "best at 10", marks=())], {"b"}),
    ],
)
def test_nodes_of_one_kind_are_compared_bitwise_and_others_to_rounding(reports, expected):
    assert find_differing(list(zip("abc", reports, strict=False))) == expected


def test_marks_tell_a_missed_update_from_rounding():
    torch.manual_seed(0)
    start = torch.randn(20 * 64)
    states = [start.clone().requires_grad_() for _ in range(2)]
    optimizers = [torch.optim.AdamW([state], lr=1e-2) for state in states]
    for step in range(50):
        gradient = torch.randn(len(start), generator=torch.Generator().manual_seed(step)) + 1
        for number, (state, optimizer) in enumerate(zip(states, optimizers, strict=True)):
            state.grad = gradient * (1 + number * 1e-6)  # as one that clips with another norm in its last bits
            optimizer.step()

    def differing() -> set[str]:
        marks = [[mark(state.detach().double())] for state in states]
        reports = [report(str(n), kind=str(n), marks=own) for n, own in enumerate(marks)]
        return find_differing(list(zip("ab", reports, strict=True)))

    assert not torch.equal(*states) and differing() == set()
    optimizers[0].step()  # one that the other node has missed
    assert differing() == {"b"}


def test_a_node_for_which_the_run_is_over_does_not_wait_for_one_that_continues():
    members = tuple(Member(node, node, "", "") for node in "abc")
    plan = Plan(7, members, ((Range(0, 1), "a"),), {}, newcomers=("c",))
    for ends in ("a", "b", "ab", ""):
        arrived = Arrived(reports={node: {"is_final": node in ends} for node in "ab"})
        assert arrived.other_ends(plan) == ({"b"} if len(ends) == 1 else set())
    arrived.reports = {"b": {"is_final": True}, "c": {"is_final": False}}
    assert arrived.other_ends(plan) == set()  # before the first has reported


def test_of_two_nodes_that_see_another_end_the_first_decides(tmp_path):
    with Nodes(tmp_path, num_steps=60, block_s=0.002) as nodes:
        nodes.start("a")
        nodes.wait_for_step("a", 2)
        nodes.start("b", num_steps=30)
        nodes.wait_for_step("a", 40)
        assert any("node b has another state" == event["text"] for event in nodes.events("a", "say"))
