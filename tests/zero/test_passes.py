"""Passes over a sharded base: the whole base's numbers, and weights that may stay gathered are received once."""

import json

import pytest

from tests.commands import run_module
from tests.processes import ROOT

NUM_RANKS = 2
SETTINGS = ["resident", "small", "released", "prefetched", "resident recomputed", "released recomputed"]


@pytest.fixture(scope="module")
def ranks(tiny_bases, tmp_path_factory) -> list[dict]:
    """What each rank found."""
    out = tmp_path_factory.mktemp("passes")
    script = str(ROOT / "tests" / "zero" / "passes_many.py")
    done = run_module(script, str(out), str(tiny_bases["llama"]), num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_passes_of_every_kind_give_the_whole_bases_numbers(ranks, setting):
    for rank in ranks:
        assert max(difference for _, difference, _, _ in rank[setting]["passes"]) < 1e-6
        assert rank[setting]["changed"] == []


@pytest.mark.parametrize("setting", ["resident", "resident recomputed"])
def test_what_stays_is_received_once_whatever_kind_of_pass_follows(ranks, setting):
    for rank in ranks:
        (_, _, first, _), *later = rank[setting]["passes"]
        assert first > 0 and [num for _, _, num, _ in later] == [0] * len(later)
        assert sorted(later[-1][-1]) == sorted(rank[setting]["sizes"])


@pytest.mark.parametrize("setting", ["released", "released recomputed"])
def test_nothing_stays_where_nothing_may_be_live(ranks, setting):
    for rank in ranks:
        for kind, _, num, held in rank[setting]["passes"]:
            assert num > 0 and held == [], kind


def test_a_threshold_that_is_given_says_what_stays(ranks):
    for rank in ranks:
        small = [size for size in rank["small"]["sizes"] if size <= 64]
        assert small
        for kind, _, num, held in rank["small"]["passes"]:
            assert num > 0 and sorted(held) == sorted(small), kind
