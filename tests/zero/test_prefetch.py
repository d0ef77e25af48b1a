"""How far ZeRO-3 gathers ahead: its sizes follow from the base, and its trace survives batches of every kind."""

import json

import pytest

from ptune_dist.base.layers import layers_of
from ptune_dist.zero.prefetch import settle_prefetch
from ptune_dist.zero.residency import count_elements
from tests.base.bases import open_only
from tests.commands import run_module
from tests.processes import ROOT

BUCKET, LIVE, REUSE = "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"
BILLION = 1_000_000_000
NUM_RANKS = 2


@pytest.fixture(scope="module")
def model(llama):
    return open_only(llama).model


def settle(model, **zero) -> dict:
    content = {"zero_optimization": {"stage": 3} | zero}
    settle_prefetch(content, model)
    return content["zero_optimization"]


def layer_of(model) -> int:
    return max(count_elements(layer) for layer in layers_of(model))


@pytest.mark.parametrize("given", [{}, {BUCKET: "auto", LIVE: "auto", REUSE: "auto"}])
def test_the_next_layer_is_gathered_whole(model, given):
    assert settle(model, **given) == {"stage": 3, BUCKET: layer_of(model), LIVE: BILLION, REUSE: BILLION}


def test_two_layers_may_be_live_however_large_they_are(model, monkeypatch):
    monkeypatch.setattr("ptune_dist.zero.prefetch.DEFAULT_LIVE", 10)
    assert settle(model)[LIVE] == 2 * layer_of(model)


def test_the_elements_of_int8_tensors_count(llama):
    quantized = open_only(llama, int8={"include": [], "threshold": None}).model
    sizes = [parameter.numel() for parameter in layers_of(quantized)[0].parameters()]
    assert settle(quantized)[BUCKET] == sum(sizes) > 0


def test_numbers_that_are_given_are_kept(model):
    given = {BUCKET: 7, LIVE: 8, REUSE: 9}
    assert settle(model, **given) == {"stage": 3} | given


def test_a_base_on_nvme_is_released_at_once(model):
    filled = settle(model, offload_param={"device": "nvme"})
    assert (filled[BUCKET], filled[LIVE], filled[REUSE]) == (layer_of(model), 2 * layer_of(model), 0)
    assert settle(model, offload_param={"device": "nvme"}, **{BUCKET: BILLION})[BUCKET] == layer_of(model)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_without_shards_nothing_is_filled(model, stage):
    assert settle(model, stage=stage, **{BUCKET: "auto"}) == {"stage": stage}


@pytest.fixture(scope="module")
def traces(llama, tmp_path_factory) -> list[dict]:
    """What each rank found."""
    out = tmp_path_factory.mktemp("traces")
    script = str(ROOT / "tests" / "zero" / "traces_many.py")
    done = run_module(script, str(out), str(llama), num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("placement", ["prefix", "infix", "int8"])
def test_the_trace_stays_complete_whatever_targets_a_batch_has(traces, placement):
    for rank in traces:
        steps = rank[placement]
        assert len({step["num_chunks"] for step in steps}) > 2
        assert [step["is_complete"] for step in steps] == [False] + [True] * (len(steps) - 1)


@pytest.mark.parametrize("placement", ["prefix", "infix", "int8"])
def test_a_layer_is_there_or_on_its_way_when_it_is_needed(traces, placement):
    for rank in traces:
        for step in rank[placement][1:]:
            assert len(step["ahead"]) >= 2 * rank["num_layers"]  # forward and backward
            assert min(step["ahead"]) >= 0.9


def test_no_timer_of_deepspeed_runs(traces):
    assert not any(rank["has_timed"] for rank in traces)
