"""A node that differs from the others is named before any rank is started, with what to do about it."""

from dataclasses import replace
from pathlib import Path

import pytest

from ptune_dist.cluster import node_facts
from ptune_dist.cluster.node_facts import NodeFacts, gather_facts, judge_facts
from ptune_dist.cluster.outcome import Outcome
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from tests.conftest import write_config

HEALTHY = NodeFacts("n0", num_procs=8, config_digest="c0ffee", versions="torch 2.13", free_bytes=1 << 40)


def make_facts(number: int, **odd: object) -> list[NodeFacts]:
    """The facts about `number` healthy nodes, the last of which is odd."""
    facts = [replace(HEALTHY, node=f"n{i}") for i in range(number)]
    facts[-1] = replace(facts[-1], **odd)
    return facts


def judge(facts: list[NodeFacts], skews_s: list[float] | None = None) -> Outcome | None:
    return judge_facts(facts, skews_s or [0.0] * len(facts), "runs/a")


@pytest.mark.parametrize("number", [1, 2, 5])
def test_equal_nodes_are_fit(number: int):
    assert judge(make_facts(number)) is None


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"num_procs": 7}, "node n{} differs from the other nodes in its number of processes (GPUs): 7, not 8: use"),
        ({"config_digest": "bad"}, "node n{} differs from the other nodes in its config: bad, not c0ffee: start"),
        ({"versions": "torch 2"}, "node n{} differs from the other nodes in its versions: torch 2, not torch 2.13: in"),
        ({"free_bytes": 3 << 20}, "node n{}: only 3.0 MiB are free in output_dir runs/a"),
        ({"mistake": "c.yaml: no such file"}, "node n{}: c.yaml: no such file"),
    ],
)
def test_the_odd_node_is_named(number: int, odd: dict, message: str):
    outcome = judge(make_facts(number, **odd))
    assert outcome.reason.startswith(message.format(number - 1)), outcome.reason
    assert (outcome.kind, outcome.node, outcome.exit_status) == ("mistake", f"n{number - 1}", 2)


def test_the_majority_is_right_even_against_the_head():
    facts = make_facts(3, num_procs=8)
    facts[0] = replace(facts[0], num_procs=4)
    assert judge(facts).node == "n0"


def test_a_nodes_own_mistake_explains_its_missing_facts():
    facts = [*make_facts(2), NodeFacts("n2", mistake="torch is not installed")]
    assert judge(facts).reason == "node n2: torch is not installed"
    assert judge([NodeFacts("n0", mistake="c.yaml: no such file")]).reason == "c.yaml: no such file"


@pytest.mark.parametrize(
    ("skews_s", "named"),
    [
        ([0, 0, 9], ("n2", "+9 s")),
        ([0, -400, 1], ("n1", "-400 s")),
        ([0, 30, 30], ("n0", "-30 s")),  # the head's own clock is the wrong one
        ([0, 8], ("n1", "+8 s")),
        ([0, 4, -4], None),
        ([70, 70, 70], None),  # all messages were read late
    ],
)
def test_a_wrong_clock_is_named(skews_s: list[int], named: tuple[str, str] | None):
    outcome = judge(make_facts(len(skews_s)), [float(skew_s) for skew_s in skews_s])
    if named is None:
        assert outcome is None
    else:
        node, skew = named
        assert outcome.node == node and f"clock differs from the other nodes' by {skew}" in outcome.reason


def test_equal_configs_have_equal_digests(tmp_path: Path):
    path = write_config(tmp_path / "c.yaml")
    one, same = (gather_facts(name, load_config(path), 1, 0) for name in ("a", "b"))
    other = gather_facts("c", load_config(path, ["seed=1"]), 1, 0)
    assert one.config_digest == same.config_digest != other.config_digest
    assert judge_facts([one, same], [0, 0], "") is None
    assert one.free_bytes > 0 and "torch 2" in one.versions  # output_dir need not exist yet


def test_there_is_one_process_per_gpu_unless_a_number_is_requested(tmp_path: Path):
    config = load_config(write_config(tmp_path / "c.yaml"))
    for requested, num_gpus, num_procs in ((None, 0, 1), (None, 1, 1), (None, 8, 8), (5, 0, 5), (2, 8, 2)):
        facts = gather_facts("a", config, requested, num_gpus)
        assert (facts.num_procs, facts.num_gpus) == (num_procs, num_gpus)


def test_only_a_node_with_gpus_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(write_config(tmp_path / "c.yaml"))
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gather_facts("a", config, 1, 0).num_gpus == 0
    with pytest.raises(UserError, match="Triton needs a C compiler, and there is no gcc or clang: install gcc"):
        gather_facts("a", config, 1, 1)


def test_a_missing_package_is_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(node_facts, "PACKAGES", ("torch", "no-such-package"))
    with pytest.raises(UserError, match="no-such-package is not installed"):
        gather_facts("a", load_config(write_config(tmp_path / "c.yaml")), 1, 0)
