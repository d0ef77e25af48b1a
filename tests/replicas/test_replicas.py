"""Nodes as replicas: whatever nodes there are, and whichever of them are lost, leave or join, the run is the same."""

import pytest

from tests.replicas.nodes import Cluster, train_alone


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Cluster:
    """The run of one node."""
    return train_alone(tmp_path_factory.mktemp("alone") / "run")


def test_two_nodes_train_what_one_does_bit_for_bit(tmp_path, alone):
    cluster = Cluster(tmp_path / "two", train={"min_nodes": 2})
    nodes = [cluster.start(name) for name in "ab"]
    assert [node.finish() for node in nodes] == [{0}, {0}], nodes[0].output + nodes[1].output
    assert cluster.losses() == alone.losses()
    assert cluster.final() == alone.final()
    assert cluster.status()["state"] == "done"
