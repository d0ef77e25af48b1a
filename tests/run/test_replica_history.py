"""What metrics.jsonl says of an exchange."""

import pytest

from ptune_dist.nodes.agreement import Agreed, Member, OwnReport
from ptune_dist.nodes.blocks import Range
from ptune_dist.run.node_history import History


@pytest.mark.parametrize(("own_s", "slower_nodes_s"), [(1.0, 0.5), (1.5, 0.0)])
def test_waiting_for_slower_nodes_is_told_apart(own_s, slower_nodes_s):
    members = (Member("a", "n1", "n1:1", ""), Member("b", "n2", "n2:1", ""))
    reports = {"a": OwnReport(seconds=1.0), "b": OwnReport(seconds=1.5)}
    history = History(seconds=0.6, blocks_s=own_s)
    history.count(Agreed(1, 1, members, reports, {"a": (Range(0, 1),), "b": (Range(1, 2),)}))
    assert history.facts()["exchange_s"] == 0.6
    assert history.facts()["slower_nodes_s"] == slower_nodes_s
