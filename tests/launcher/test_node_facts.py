"""Before any rank is started, a node that is unlike the others is named, and what to do about it."""

from dataclasses import replace

import pytest

from ptune_dist.cluster import node_facts as facts
from ptune_dist.cluster.node_facts import NodeFacts, count_procs, gather_facts, judge_facts
from ptune_dist.config.load import load_config
from tests.conftest import write_config

SOUND = NodeFacts("n0", num_procs=8, config_digest="c0ffee", versions="torch 2.13", free_bytes=1 << 40)


def nodes(number: int, **odd) -> list[NodeFacts]:
    """So many sound nodes, the last of which is odd."""
    found = [replace(SOUND, node=f"n{i}") for i in range(number)]
    found[-1] = replace(found[-1], **odd)
    return found


def judge(found, skews_s=None):
    return judge_facts(found, skews_s or [0.0] * len(found), "runs/a")


@pytest.mark.parametrize("number", [1, 2, 5])
def test_nodes_that_are_alike_are_fit(number):
    assert judge(nodes(number)) is None


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"num_procs": 7}, "node n{} has other processes (GPUs) than most: 7, not 8"),
        ({"config_digest": "bad"}, "node n{} has other config than most: bad, not c0ffee"),
        ({"versions": "torch 2.12"}, "node n{} has other versions than most: torch 2.12, not torch 2.13"),
        ({"free_bytes": 3 << 20}, "node n{}: only 3.0 MiB are free in output_dir runs/a"),
        ({"mistake": "c.yaml: no such file"}, "node n{}: c.yaml: no such file"),
    ],
)
def test_the_odd_node_is_named(number, odd, said):
    end = judge(nodes(number, **odd))
    assert end.reason.startswith(said.format(number - 1)), end.reason
    assert (end.kind, end.node, end.status) == ("mistake", f"n{number - 1}", 2)


def test_the_majority_is_right_wherever_it_stands():
    found = nodes(3, num_procs=8)
    found[0] = replace(found[0], num_procs=4)  # the head itself
    assert judge(found).node == "n0"


def test_a_mistake_of_a_nodes_own_explains_all_that_it_lacks():
    found = [*nodes(2), NodeFacts("n2", mistake="torch is not installed")]
    assert judge(found).reason == "node n2: torch is not installed"
    assert judge([NodeFacts("n0", mistake="c.yaml: no such file")]).reason == "c.yaml: no such file"


@pytest.mark.parametrize(
    ("skews_s", "named"),
    [
        ([0, 0, 9], ("n2", "+9 s")),
        ([0, -400, 1], ("n1", "-400 s")),
        ([0, 30, 30], ("n0", "-30 s")),  # the head's own clock is the wrong one
        ([0, 8], ("n1", "+8 s")),
        ([0, 4, -4], None),
        ([70, 70, 70], None),  # all were heard late
    ],
)
def test_a_clock_that_is_off_is_named(skews_s, named):
    end = judge(nodes(len(skews_s)), [float(s) for s in skews_s])
    assert (end and end.node) == (named and named[0])
    assert not named or f"clock is {named[1]} off" in end.reason


def test_two_nodes_with_the_same_config_have_the_same_digest(tmp_path):
    path = write_config(tmp_path / "c.yaml")
    one, same = (gather_facts(name, load_config(path), 1) for name in ("a", "b"))
    other = gather_facts("c", load_config(path, ["seed=1"]), 1)
    assert one.config_digest == same.config_digest != other.config_digest
    assert judge_facts([one, same], [0, 0], "") is None
    assert one.free_bytes > 0 and "torch 2" in one.versions  # output_dir need not exist yet


@pytest.mark.parametrize(
    ("visible", "number"), [("0,1,2", 3), ("", 1), ("-1", 1), ("GPU-8a,GPU-8b", 2), ("MIG-GPU-1/2/3", 1)]
)
def test_one_process_for_each_visible_gpu(monkeypatch, visible, number):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_procs(None) == number
    assert count_procs(5) == 5


def test_without_the_variable_nvidia_smi_is_asked_and_without_it_there_is_one_process(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_procs(None) == 1
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)'\necho 'GPU 1: H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert count_procs(None) == 2


def test_a_missing_package_is_the_nodes_mistake(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(facts.UserError, match="no-such-package is not installed"):
        gather_facts("a", load_config(write_config(tmp_path / "c.yaml")), 1)
