"""Nodes train together, and the result is bitwise what one undisturbed node computes, whatever happens to them."""

import pytest

from tests.nodes.nodes import Nodes


def test_one_node_trains_alone(tmp_path):
    with Nodes(tmp_path, num_steps=5) as nodes:
        nodes.start("a")
        nodes.wait_for_end("a")
        nodes.check("a")


def test_nodes_agree_bitwise_at_each_step(tmp_path):
    with Nodes(tmp_path, num_steps=20, min_nodes=3) as nodes:
        for name in "abc":
            nodes.start(name)
        nodes.wait_for_end(*"abc")
        nodes.check(*"abc")
        assert all(event["blocks"].keys() == {*"abc"} for event in nodes.events("a", "step"))


def test_a_node_joins_and_leaves_while_others_train(tmp_path):
    with Nodes(tmp_path, num_steps=60) as nodes:
        nodes.start("a")
        nodes.wait_for_step("a", 3)
        nodes.start("b")
        nodes.wait_for_step("b", 10)
        nodes.stop("b")
        nodes.wait_for_end("a", "b")
        nodes.check("a")
        nodes.check("b", is_whole=False)
        assert nodes.events("b", "entered")[0]["step"] > 3
        sizes = [len(event["blocks"]) for event in nodes.events("a", "step")]
        assert sizes[0] == 1 and max(sizes) == 2 and sizes[-1] == 1


@pytest.mark.parametrize("lost", ["a", "b", "c"])
def test_a_node_is_killed(tmp_path, lost):
    with Nodes(tmp_path, num_steps=40, min_nodes=3, block_s=0.01) as nodes:
        for name in "abc":
            nodes.start(name)
            nodes.wait_until(lambda n=name: nodes.events(n))
        nodes.wait_for_step("a", 8)
        nodes.kill(lost)
        nodes.start("d")
        rest = [*({"a", "b", "c"} - {lost}), "d"]
        nodes.wait_for_end(*rest)
        nodes.check(*rest)
        assert max(nodes.longest_pause(name) for name in rest) < 10
        assert not any(nodes.events(name, "left behind") for name in rest)
