"""Nodes train together, and the result is bitwise what one undisturbed node computes, whatever happens to them."""

import signal
import time

import pytest

from tests.nodes.nodes import Nodes

pytestmark = pytest.mark.long


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


@pytest.mark.extended
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


@pytest.mark.parametrize("lost", ["a", pytest.param("b", marks=pytest.mark.extended)])
def test_a_node_is_killed(tmp_path, lost):
    with Nodes(tmp_path, num_steps=40, min_nodes=3, block_s=0.01) as nodes:
        nodes.start_all(*"abc")
        nodes.wait_for_step("a", 8)
        nodes.kill(lost)
        nodes.start("d")
        rest = [*({"a", "b", "c"} - {lost}), "d"]
        nodes.wait_for_end(*rest)
        nodes.check(*rest)
        assert max(nodes.longest_pause(name) for name in rest) < 10
        assert not any(nodes.events(name, "left behind") for name in rest)


@pytest.mark.extended
def test_a_node_that_stalls_is_left_behind_and_joins_again(tmp_path):
    with Nodes(tmp_path, num_steps=80, min_nodes=2, block_s=0.01) as nodes:
        nodes.start_all(*"abc")
        nodes.wait_for_step("a", 5)
        nodes.kill("b", signal.SIGSTOP)
        stopped = nodes.last_step("a")
        nodes.wait_for_step("a", stopped + 5)
        nodes.kill("b", signal.SIGCONT)
        nodes.wait_for_end(*"abc")
        nodes.check(*"abc")
        assert nodes.events("b", "left behind")
        assert len(nodes.events("b", "entered")) == 2
        assert not nodes.events("a", "left behind") and not nodes.events("c", "left behind")
        assert nodes.longest_pause("a") < 8


@pytest.mark.extended
def test_a_pause_that_is_short_is_waited_for(tmp_path):
    with Nodes(tmp_path, num_steps=40, min_nodes=3, block_s=0.01) as nodes:
        nodes.start_all(*"abc")
        nodes.wait_for_step("a", 5)
        nodes.kill("b", signal.SIGSTOP)
        time.sleep(1)
        nodes.kill("b", signal.SIGCONT)
        nodes.wait_for_end(*"abc")
        nodes.check(*"abc")
        assert len({event["view"] for event in nodes.events("c", "step")}) == 1


@pytest.mark.extended
def test_a_node_whose_training_hangs_is_left_behind(tmp_path):
    with Nodes(tmp_path, num_steps=40, min_nodes=2, block_s=0.01, limits={"stall_s": 1.0}) as nodes:
        nodes.start_all(*"abc", hang_at={"c": 8}, hang_s=6.0)
        nodes.wait_for_end("a", "b", "c")
        nodes.check("a", "b")
        assert nodes.events("c", "left behind")
        assert nodes.longest_pause("a") < 6


@pytest.mark.extended
def test_a_node_that_is_cut_off_waits_and_joins_again(tmp_path):
    """The smaller side of a cut does not continue; the larger does."""
    with Nodes(tmp_path, num_steps=120, block_s=0.01) as nodes:
        nodes.start_all(*"abc", has_relay=True)
        nodes.wait_for_step("a", 5)
        nodes.cut("a", {"b", "c"})
        cut = nodes.last_step("b")
        nodes.wait_for_step("b", cut + 3)
        assert nodes.last_step("a") <= cut + 1
        nodes.cut("a", set())
        nodes.wait_for_end(*"abc")
        nodes.check(*"abc")
        assert nodes.events("a", "left behind")
        assert not nodes.events("b", "left behind")


@pytest.mark.extended
def test_two_nodes_that_cannot_reach_each_other_do_not_both_continue(tmp_path):
    """Where one pair of three is cut, one of the pair goes; nobody trains in two groups."""
    with Nodes(tmp_path, num_steps=150, block_s=0.01) as nodes:
        nodes.start_all(*"abc", has_relay=True)
        nodes.wait_for_step("a", 5)
        nodes.cut("b", {"c"})
        nodes.cut("c", {"b"})
        cut = nodes.last_step("a")
        nodes.wait_for_step("a", cut + 10)
        nodes.cut("b", set())
        nodes.cut("c", set())
        nodes.wait_for_end(*"abc")
        nodes.check(*"abc")
        assert not nodes.events("a", "left behind")
        assert len([name for name in "bc" if nodes.events(name, "left behind")]) == 1


@pytest.mark.extended
@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.15, 0.3])
def test_the_first_node_is_lost_while_it_removes_another(tmp_path, seconds):
    with Nodes(tmp_path, num_steps=40, block_s=0.01) as nodes:
        nodes.start_all(*"abcd")
        nodes.wait_for_step("a", 5)
        nodes.kill("c")
        time.sleep(seconds)
        nodes.kill("a")
        nodes.wait_for_end("b", "d")
        nodes.check("b", "d")
        assert max(nodes.longest_pause(name) for name in "bd") < 10


@pytest.mark.extended
def test_a_node_is_lost_while_another_joins(tmp_path):
    with Nodes(tmp_path, num_steps=80, block_s=0.01) as nodes:
        nodes.start_all(*"ab")
        nodes.wait_for_step("b", 5)
        nodes.start("c", has_relay=False)
        nodes.wait_until(lambda: nodes.events("c", "say"))
        nodes.kill("a")
        nodes.wait_for_end("b", "c")
        nodes.check("b", "c")


def test_another_secret_and_another_config_are_refused_in_one_line(tmp_path):
    with Nodes(tmp_path, num_steps=400, block_s=0.01) as nodes:
        nodes.start_all("a", run={"train.max_steps": 120})
        nodes.start("b", secret="a different secret")
        nodes.start("c", run={"train.max_steps": 60})
        nodes.wait_until(lambda: all(nodes.processes[name].exitcode is not None for name in "bc"))
        assert nodes.errors("b") == (
            "error: node b is refused by node a: their secrets differ: "
            "let all nodes share output_dir, or set PTUNE_SECRET to the same text on every node\n"
        )
        assert nodes.errors("c") == (
            "error: node c is refused by node a: train.max_steps is 60 here and 120 on node a: "
            "start all nodes with the same config and the same files\n"
        )


@pytest.mark.extended
def test_fewer_nodes_than_min_nodes_wait(tmp_path):
    with Nodes(tmp_path, num_steps=60, min_nodes=2, block_s=0.01) as nodes:
        nodes.start_all("a", "b")
        nodes.wait_for_step("a", 5)
        nodes.kill("b")
        nodes.wait_until(lambda: any("1 node" in event["text"] for event in nodes.events("a", "say")[1:]))
        time.sleep(1)
        waiting = nodes.last_step("a")
        time.sleep(1)
        assert nodes.last_step("a") == waiting
        nodes.start("c")
        nodes.wait_for_end("a", "c")
        nodes.check("a", "c")


@pytest.mark.extended
def test_a_node_above_max_nodes_is_a_spare(tmp_path):
    with Nodes(tmp_path, num_steps=100, max_nodes=2, block_s=0.01) as nodes:
        nodes.start_all(*"ab")
        nodes.start("c")
        nodes.wait_until(lambda: any("spare" in event["text"] for event in nodes.events("c", "say")))
        assert not nodes.events("c", "entered")
        nodes.kill("b")
        nodes.wait_until(lambda: nodes.events("c", "entered"))
        nodes.wait_for_end("a", "c")
        nodes.check("a", "c")


@pytest.mark.extended
def test_a_node_with_another_state_takes_that_of_the_others(tmp_path):
    with Nodes(tmp_path, num_steps=60, block_s=0.01) as nodes:
        nodes.start_all(*"abc", diverge_at={"c": 10})
        nodes.wait_for_end(*"abc")
        nodes.check(*"abc")
        assert "its state differs" in nodes.events("c", "left behind")[0]["why"]


def test_all_nodes_are_asked_to_stop_and_continue_later(tmp_path):
    with Nodes(tmp_path, num_steps=60, block_s=0.01) as nodes:
        nodes.start_all(*"abc")
        nodes.wait_for_step("a", 10)
        for name in "abc":
            nodes.stop(name)
        nodes.wait_for_end(*"abc")
        saved = [event for name in "abc" for event in nodes.events(name, "saved")]
        assert len(saved) == 1
        for name in "abc":
            (tmp_path / f"{name}.log.stop").unlink()
        started = time.time()
        nodes.start_all(*"cb")
        nodes.wait_for_end(*"bc")
        nodes.check(*"bc")
        again = nodes.events("c", "entered")[-1]
        assert again["step"] == saved[0]["step"] and again["at"] - started < 3


@pytest.mark.extended
def test_all_nodes_are_killed_and_continue_from_what_was_saved(tmp_path):
    with Nodes(tmp_path, num_steps=30, block_s=0.01, save_every=5) as nodes:
        nodes.start_all("a", "b")
        nodes.wait_for_step("a", 12)
        nodes.kill("a")
        nodes.kill("b")
        nodes.start_all("b", "a")
        nodes.wait_for_end("a", "b")
        nodes.check("a", "b")
        assert nodes.events("b", "entered")[-1]["step"] >= 10


@pytest.mark.extended
def test_a_node_that_waits_for_others_can_be_stopped(tmp_path):
    with Nodes(tmp_path, num_steps=30, min_nodes=2) as nodes:
        nodes.start("a")
        nodes.wait_until(lambda: nodes.events("a", "entered"))
        nodes.stop("a")
        nodes.wait_for_end("a")
        assert nodes.events("a", "saved")


def test_the_writer_is_lost_after_the_last_step(tmp_path):
    with Nodes(tmp_path, num_steps=10, block_s=0.01) as nodes:
        nodes.start_all(*"abc", save_s={"a": 60.0})
        nodes.wait_for_step("a", 10)
        nodes.kill("a")
        nodes.wait_for_end("b", "c")
        nodes.check("b", "c")
        assert len([event for name in "bc" for event in nodes.events(name, "saved")]) == 1
