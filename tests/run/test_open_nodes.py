"""How nodes find each other, what they must have in common, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from ptune_dist.config.load import load_config
from ptune_dist.distributed.world import World
from ptune_dist.errors import UserError
from ptune_dist.run.open_nodes import choose_num_blocks, digest_run, read_rendezvous, settle_nodes
from tests.conftest import write_config


@pytest.fixture
def load(tmp_path):
    def load_train(**train):
        return load_config(write_config(tmp_path / "c.yaml", train={"learning_rate": 0.1, **train}))

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
    assert settle_nodes(load(), world_of(2)).train.nodes == "one_world"


def test_the_rendezvous_is_a_folder_or_an_address(tmp_path, monkeypatch):
    assert read_rendezvous(tmp_path) == tmp_path
    for value, found in ((str(tmp_path / "other"), tmp_path / "other"), ("head:29400", "head:29400")):
        monkeypatch.setenv("PTUNE_RENDEZVOUS", value)
        assert read_rendezvous(tmp_path) == found


def test_nodes_agree_on_what_is_learned_and_may_differ_in_how_it_is_computed(load):
    def digest(**train) -> str:
        job = SimpleNamespace(config=load(**train), fingerprint="base")
        return digest_run(job, SimpleNamespace(digest=lambda: "rows"))

    same = digest()
    assert digest(micro_batch_tokens=64, hang_timeout_s=5, min_nodes=2) == same
    assert digest(learning_rate=0.2) != same and digest(batch_size=4) != same


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
