"""Nodes as replicas: whatever nodes there are, and whichever of them are lost, leave or join, the run is the same."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from ptune_dist.run.checkpoint import list_checkpoints
from tests.replicas.nodes import VALIDATION, ZERO3, Cluster, Node, train_alone

STEPS = 16
ONE_WORLD = ("train.nodes=one_world", "train.num_blocks=auto")
SHORT = {"max_steps": STEPS, "batch_size": 8, "num_blocks": 4}
EVALUATED = {"data": VALIDATION, "evaluate": {"every": 5, "max_examples": 8, "num_samples": 0}}


def check_same(cluster: Cluster, alone: Cluster) -> None:
    """The folder is that of the undisturbed run."""
    assert cluster.steps() == alone.steps()  # each step once
    assert cluster.losses() == alone.losses()
    assert cluster.final() == alone.final()
    assert cluster.status()["state"] == "done"
    names = [path.name for path in list_checkpoints(cluster.run / "checkpoints")]
    assert names == [path.name for path in list_checkpoints(alone.run / "checkpoints")]
    for name in ("evaluations.jsonl", "prompt/prompt.safetensors"):
        assert (cluster.run / name).read_bytes() == (alone.run / name).read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Cluster:
    """The run of one node."""
    return train_alone(tmp_path_factory.mktemp("alone") / "run", train=SHORT, checkpoint={"every": 5}, **EVALUATED)


@pytest.mark.long
def test_the_writer_is_killed_and_another_node_takes_over_its_folder(tmp_path, alone):
    cluster = Cluster(tmp_path / "killed", train=SHORT, checkpoint={"every": 5}, **EVALUATED)
    writer = cluster.start("first")
    cluster.wait_for_step(1)
    other = cluster.start("second")
    cluster.wait_for_member("second")
    writer.kill()
    assert writer.finish() == {-signal.SIGKILL}
    assert other.finish() == {0}, other.output
    check_same(cluster, alone)
    assert "node first" in (cluster.run / "train.log").read_text()  # one line tells of the loss
    last = cluster.history()[-1]
    assert last["blocks"] == {"second": [[0, 4]]}


@pytest.mark.long
def test_nodes_leave_and_join_and_the_last_one_saves(tmp_path, alone):
    cluster = Cluster(tmp_path / "left", train=SHORT, checkpoint={"every": 5}, **EVALUATED)
    first = cluster.start("first")
    cluster.wait_for_step(1)
    second = cluster.start("second")
    cluster.wait_for_member("second")
    first.stop()
    assert first.finish() == {75}
    # Within an evaluation it does not wait to hear whether the others stop too.
    assert "on request; the other nodes continue" in first.output or "on request; the same command" in first.output
    second.stop()
    assert second.finish() == {75}, second.output
    status = cluster.status()
    assert status["state"] == "stopped" and status["step"] == cluster.steps()[-1] < STEPS
    third = cluster.start("third")
    assert third.finish() == {0}, third.output
    extra = cluster.run / "checkpoints" / f"step-{status['step']:08d}"
    assert (extra / "state.json").exists()
    if status["step"] % 5:
        shutil.rmtree(extra)
    check_same(cluster, alone)


def start_two(folder: Path, train: dict) -> tuple[Cluster, Node, Node]:
    """A run, the node that writes it, and one that has joined."""
    cluster = Cluster(folder / "run", train=train)
    first = cluster.start("first")
    cluster.wait_for_step(1)
    second = cluster.start("second")
    cluster.wait_for_member("second")
    return cluster, first, second


@pytest.mark.long
def test_a_node_that_was_left_behind_and_then_writes_keeps_the_lines_of_the_steps_that_it_missed(tmp_path):
    train = {"max_steps": 24, "batch_size": 64, "num_blocks": 4, "stall_timeout_s": 2}
    cluster, first, second = start_two(tmp_path, train)
    second.send(signal.SIGSTOP)
    cluster.wait_for_view(lambda found: "second" not in found["blocks"])
    missed = cluster.history()[-1]["step"]
    second.send(signal.SIGCONT)
    cluster.wait_for_member("second")
    first.kill()
    assert first.finish() == {-signal.SIGKILL} and second.finish() == {0}, second.output
    assert second.output.count("has joined in view") == 2 and second.output.count("loaded in") == 1
    back = next(found["step"] for found in cluster.history() if found["step"] > missed and "second" in found["blocks"])
    assert back > missed + 1
    assert cluster.steps() == [*range(1, 25)]


@pytest.mark.long
@pytest.mark.parametrize("is_finished", [True, pytest.param(False, marks=pytest.mark.extended)])
def test_a_node_that_was_frozen_beyond_the_end_of_the_others_leaves_what_they_have_done(tmp_path, is_finished):
    """They have finished the run, or saved it after a request to stop."""
    train = {**SHORT, "batch_size": 64, "max_steps": 12 if is_finished else 40, "stall_timeout_s": 2}
    cluster, first, second = start_two(tmp_path, train)
    second.send(signal.SIGSTOP)
    if not is_finished:
        cluster.wait_for_step(len(cluster.steps()) + 4)
        first.stop()
    assert first.finish() == {0 if is_finished else 75}, first.output
    before = (cluster.run / "metrics.jsonl").read_bytes()
    second.send(signal.SIGCONT)
    assert second.finish() == {0}, second.output
    after = (cluster.run / "metrics.jsonl").read_bytes()
    assert after == before if is_finished else after.startswith(before)
    assert cluster.steps() == [*range(1, train["max_steps"] + 1)] and cluster.status()["state"] == "done"


@pytest.mark.extended
def test_a_spare_that_is_asked_to_stop_ends_with_75_and_leaves_the_run_alone(tmp_path):
    cluster = Cluster(tmp_path / "spare", train=SHORT | {"max_steps": 10_000, "max_nodes": 1})
    first = cluster.start("first")
    cluster.wait_for_step(1)
    spare = cluster.start("spare")
    spare.wait_for_line("node spare waits as a spare")
    spare.stop()
    assert spare.finish() == {75}, spare.output
    assert "node spare stopped while waiting to join\n" in spare.output and "Traceback" not in spare.output
    assert cluster.status()["state"] == "running"
    first.stop()
    assert first.finish() == {75}, first.output


@pytest.mark.extended
@pytest.mark.parametrize("evaluate", [{"every": 0}, {"every": 1, "metrics": ["exact_match"]}])
def test_nodes_that_are_all_asked_to_stop_save_once(tmp_path, evaluate):
    train = {**SHORT, "max_steps": 1000, "min_nodes": 2}
    cluster = Cluster(tmp_path / "run", train=train, checkpoint={"every": 0}, data=VALIDATION, evaluate=evaluate)
    nodes = [cluster.start(name) for name in "ab"]
    cluster.wait_for_step(3)
    for node in nodes:
        node.stop()
    assert [node.finish() for node in nodes] == [{75}, {75}], nodes[0].output
    status = cluster.status()
    assert (status["state"], status["step"]) == ("stopped", cluster.steps()[-1])
    assert len(list_checkpoints(cluster.run / "checkpoints")) == 1


@pytest.mark.extended
def test_worlds_of_two_ranks_under_zero3_train_what_one_world_does(tmp_path):
    train = {**SHORT, "min_nodes": 2}
    cluster = Cluster(tmp_path / "two", 2, train=train, deepspeed=ZERO3)
    nodes = [cluster.start(name) for name in "ab"]
    assert [node.finish() for node in nodes] == [{0}, {0}], nodes[0].output + nodes[1].output
    one_rank = train_alone(tmp_path / "one", train=SHORT, deepspeed=ZERO3)
    one_world = train_alone(tmp_path / "world", *ONE_WORLD, num_ranks=2, train=SHORT, deepspeed=ZERO3)
    assert cluster.losses() == one_rank.losses() and cluster.final() == one_rank.final()
    assert cluster.losses() == pytest.approx(one_world.losses(), rel=1e-5)


@pytest.mark.extended
def test_all_ranks_of_a_node_are_killed_under_zero3(tmp_path):
    alone = train_alone(tmp_path / "alone", num_ranks=2, train=SHORT, deepspeed=ZERO3, **EVALUATED)
    cluster = Cluster(tmp_path / "killed", 2, train=SHORT, deepspeed=ZERO3, **EVALUATED)
    nodes = [cluster.start("a")]
    cluster.wait_for_step(1)
    nodes.append(cluster.start("b"))
    cluster.wait_for_member("b")
    nodes[0].kill()
    assert nodes[0].finish() == {-signal.SIGKILL}
    assert nodes[1].finish() == {0}, nodes[1].output
    check_same(cluster, alone)


@pytest.mark.extended
def test_a_sweep_with_halving_is_the_same_on_two_nodes(tmp_path):
    sections = {"sweep": {"seed": [0, 1, 2, 3]}, "sweep_halving": {"every": 5, "keep": 0.5}, **EVALUATED}
    alone = train_alone(tmp_path / "alone", train=SHORT, **sections)
    cluster = Cluster(tmp_path / "two", train={**SHORT, "min_nodes": 2}, **sections)
    nodes = [cluster.start(name) for name in "ab"]
    assert [node.finish() for node in nodes] == [{0}, {0}], nodes[0].output + nodes[1].output
    assert cluster.losses() == alone.losses() and cluster.final() == alone.final()
    kept = ("ranking", "validation", "best_step")
    found, wanted = (json.loads((run.run / "summary.json").read_text()) for run in (cluster, alone))
    assert {key: found[key] for key in kept} == {key: wanted[key] for key in kept}


@pytest.mark.extended
def test_over_hundreds_of_steps_with_a_stall_a_loss_and_a_join_the_run_is_the_undisturbed_one(tmp_path):
    train = {**SHORT, "max_steps": 200, "stall_timeout_s": 2, "schedule": "cosine"}
    cluster = Cluster(tmp_path / "disturbed", train=train, checkpoint={"every": 50})
    nodes = [cluster.start("a")]
    cluster.wait_for_step(1)
    nodes.append(cluster.start("b"))
    cluster.wait_for_member("b")
    nodes[0].send(signal.SIGSTOP)  # the writer
    cluster.wait_for_view(lambda found: "a" not in found["blocks"])
    step = cluster.steps()[-1]
    nodes[0].send(signal.SIGCONT)
    cluster.wait_for_view(lambda found: found["step"] > step and "a" in found["blocks"])
    nodes[1].kill()
    nodes.append(cluster.start("c"))
    cluster.wait_for_member("c")
    assert [node.finish() for node in nodes] == [{0}, {-signal.SIGKILL}, {0}], nodes[0].output
    assert nodes[0].output.count("loaded in") == 1  # the one that stalled has not loaded its base again
    alone = train_alone(tmp_path / "alone", train=train, checkpoint={"every": 50})
    check_same(cluster, alone)
    del train["stall_timeout_s"]
    one_world = train_alone(tmp_path / "world", *ONE_WORLD, train=train, checkpoint={"every": 50})
    assert cluster.losses() == pytest.approx(one_world.losses(), rel=1e-5)


@pytest.mark.extended
def test_nodes_of_different_kinds_train_together(tmp_path, alone):
    train = {**SHORT, "min_nodes": 2}
    cluster = Cluster(tmp_path / "kinds", train=train, checkpoint={"every": 5}, **EVALUATED)
    nodes = [cluster.start("new"), cluster.start("old", env={"ATEN_CPU_CAPABILITY": "default"})]
    assert [node.finish() for node in nodes] == [{0}, {0}], nodes[1].output
    log = (cluster.run / "train.log").read_text()
    assert log.count("nodes are of different kinds") == 1 and "DEFAULT" in log
    assert "has another state" not in nodes[0].output + nodes[1].output
    assert cluster.losses() == pytest.approx(alone.losses(), rel=1e-5)
