"""How nodes find each other, what they must have in common, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import TrainConfig
from ptune_dist.distributed.world import World
from ptune_dist.errors import UserError
from ptune_dist.evaluation.during_training import is_due
from ptune_dist.nodes.run_facts import describe_difference, digest_facts
from ptune_dist.run.folder import read_key
from ptune_dist.run.open_nodes import choose_num_blocks, choose_num_workers, read_rendezvous, settle_nodes
from ptune_dist.run.run_facts import OF_A_NODE, build_facts, flatten
from tests.conftest import write_config


@pytest.fixture
def load(tmp_path):
    def load_train(**train):
        return load_config(
            write_config(tmp_path / "c.yaml", train={"learning_rate": 0.1, "nodes": "replicas", **train})
        )

    return load_train


def world_of(size: int) -> World:
    return World(0, size, torch.device("cpu"))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"num_blocks": 6}, "train.num_blocks: a power of two up to 4,096 is needed, not 6"),
        ({"num_blocks": 16, "batch_size": 8}, "train.num_blocks: 16 blocks are more than the rows of a step"),
        ({"min_nodes": 4, "max_nodes": 2}, "train.max_nodes is 2, less than train.min_nodes, 4"),
        ({"nodes": "many"}, "train.nodes"),
        ({"nodes": "one_world", "sync_every": 4}, "train.sync_every: 4 needs train.nodes: replicas"),
        ({"nodes": "one_world", "min_nodes": 2}, "train.min_nodes: 2 needs train.nodes: replicas"),
        ({"nodes": "one_world", "stall_timeout_s": 5}, "train.stall_timeout_s: 5.0 needs train.nodes: replicas"),
        ({"num_workers": 3}, "train.num_workers: a power of two is needed, not 3"),
        ({"num_workers": 16, "batch_size": 8}, "train.num_workers: 16 workers are more than the rows of a step"),
    ],
)
def test_mistakes_are_told_in_one_line(load, train, message):
    with pytest.raises(UserError, match=message):
        load(**train)


def test_replicas_need_a_world_of_each_node_and_auto_follows_it(load, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="train.nodes: replicas needs a world of its own on each node"):
        settle_nodes(load(nodes="replicas"), world_of(4))
    assert settle_nodes(load(nodes="auto"), world_of(4)).train.nodes == "one_world"
    assert settle_nodes(load(nodes="auto"), world_of(2)).train.nodes == "replicas"
    assert settle_nodes(load(nodes="one_world"), world_of(2)).train.nodes == "one_world"
    one_world = settle_nodes(load(nodes="auto", min_nodes=2), world_of(4)).train
    assert TrainConfig.model_validate(one_world.model_dump()).min_nodes == 1  # a run's config.yaml can be read again


def test_local_steps_need_replicas_and_no_loss_scale(load, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = load(nodes="auto", sync_every=4)
    assert settle_nodes(config, world_of(2)).train.nodes == "replicas"
    with pytest.raises(UserError, match="train.sync_every: 4 needs replicas, a world of its own on each node"):
        settle_nodes(config, world_of(4))
    with pytest.raises(UserError, match="train.sync_every: 4 does not go with model.dtype float16"):
        load_config(tmp_path / "c.yaml", ["model.dtype=float16"])


def test_there_is_a_worker_for_each_node_that_is_expected_and_each_has_rows(load, monkeypatch):
    assert choose_num_workers(load(max_nodes=3).train) == 4
    assert choose_num_workers(load(max_nodes=16, batch_size=10).train) == 8
    monkeypatch.setenv("PTUNE_EXPECTED_NODES", "2")
    assert choose_num_workers(load().train) == 2


@pytest.mark.parametrize(("sync_every", "due"), [(1, [3, 6, 9]), (2, [4, 6, 10]), (4, [4, 8, 12]), (8, [8])])
def test_what_is_due_within_a_period_comes_at_its_end(load, sync_every, due):
    config = load(nodes="auto", sync_every=sync_every, max_steps=100)
    exchanges = range(sync_every, 12 + 1, sync_every)
    assert [step for step in exchanges if is_due(3, step, config) and step <= due[-1]] == due


def test_the_rendezvous_is_a_folder_or_an_address(tmp_path, monkeypatch):
    assert read_rendezvous(tmp_path) == tmp_path
    for value, found in ((str(tmp_path / "other"), tmp_path / "other"), ("head:29400", "head:29400")):
        monkeypatch.setenv("PTUNE_RENDEZVOUS", value)
        assert read_rendezvous(tmp_path) == found


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("head-node", "no such folder"),
        ("head:x", "HOST:PORT is needed"),
        ("head:70000", "a port is a number from 1 to 65535"),
        ("tcp://head:29400", "HOST:PORT is needed"),
    ],
)
def test_a_rendezvous_that_is_neither_is_a_mistake(tmp_path, monkeypatch, value, why):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTUNE_RENDEZVOUS", value)
    with pytest.raises(UserError, match=f"PTUNE_RENDEZVOUS is '{value}': {why}: write HOST:PORT, or a path with a s"):
        read_rendezvous(tmp_path)


def test_nodes_agree_on_what_is_learned_and_may_differ_in_how_it_is_computed(load):
    engine = SimpleNamespace(prompts=SimpleNamespace(loss_scale=None))

    def facts(rows: str = "rows", **train):
        return build_facts(SimpleNamespace(config=load(**train), engine=engine, fingerprint="base"), {"train": rows})

    own = facts(max_steps=120)
    assert digest_facts(facts(max_steps=120, micro_batch_tokens=64, hang_timeout_s=5)) == digest_facts(own)
    advice = ": start all nodes with the same config and the same files"
    for others, expected in [
        (facts(max_steps=60), "train.max_steps is 120 here and 60 on node A"),
        (facts(max_steps=120, learning_rate=0.2), "train.learning_rate is 0.1 here and 0.2 on node A"),
        (facts("other rows", max_steps=120), "the data of train is not that of node A"),
    ]:
        assert digest_facts(others) != digest_facts(own)
        assert describe_difference(own, others, "A") == expected + advice


def test_what_ends_a_run_is_equal_on_all_nodes(load, tmp_path):
    load(max_steps=9)
    found = flatten(load_config(tmp_path / "c.yaml").model_dump(mode="json"))
    keys = ("train.max_steps", "train.epochs", "train.average_last", "evaluate.patience", "checkpoint.keep")
    assert set(keys) <= set(found) and not set(OF_A_NODE) & set(found)
    content = load_config(tmp_path / "c.yaml").model_dump()
    for key in OF_A_NODE:
        read_key(content, key)  # a key that was renamed would be compared


@pytest.mark.parametrize(
    ("num_positions", "train", "num_ranks", "expected"),
    [
        (100, {}, 1, 4),  # a small step: a block for each of the ranks that are expected
        (100, {"max_nodes": 2}, 4, 8),
        (100, {"min_nodes": 8}, 1, 8),
        (64 * 1000, {}, 1, 64),  # a large one: a block for each micro-batch
        (10**7, {}, 1, 64),  # but no empty ones
    ],
)
def test_auto_has_a_block_for_each_micro_batch_and_each_rank(load, num_positions, train, num_ranks, expected):
    engine = SimpleNamespace(
        members=["prompt"],
        model=SimpleNamespace(count_positions=lambda units, _: num_positions),
        cap_positions=lambda tokens: tokens,
    )
    config = load(batch_size=64, **train)
    job = SimpleNamespace(config=config, engine=engine, micro_batch=SimpleNamespace(tokens=1000))
    rows = SimpleNamespace(
        of_step=lambda *_: {}, units=lambda *_: [(example, (0,)) for example in range(64)], examples=None
    )
    assert choose_num_blocks(job, rows, world_of(num_ranks)) == expected
