"""Invariant 4: the segment pass equals the plain one-pass forward, in losses and in the prompts' gradients."""

import dataclasses

import numpy as np
import pytest
import torch

from ptune_dist.data.batches import Batch
from ptune_dist.distributed.world import World
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.model.contexts import ContextReader
from tests.conftest import ARCHITECTURES, SEQ2SEQ, extended_beyond
from tests.numerics.passes import (
    assert_same,
    build_base,
    build_model,
    draw_batch,
    draw_tokens,
    hold,
    losses_and_gradients,
    placement_of,
    plain_losses_and_gradients,
)

CASES = ["prefix", "infix", "shared", "template"]
KINDS = [*ARCHITECTURES, "qwen2_window", "mistral_window", "gemma2", "deepseek_v2", "deepseek_v3"]


@pytest.fixture(scope="module")
def bases() -> dict:
    """Every base once; models are made over copies."""
    return {kind: build_base(kind) for kind in (*KINDS, *SEQ2SEQ)}


def build_reader(model, lead=None, cache: bool = True) -> ContextReader:
    def read(work):
        with torch.no_grad():
            return model.read_contexts(work)

    kept = ContextCache(max_bytes=1 << 24, folder=None, identity="here") if cache else None
    world = World(0, 1, torch.device("cpu"))
    reader = ContextReader(read, model, world, cache=kept, is_sharded=False)
    if lead is not None:
        reader.set_lead(lead, False)
    return reader


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_plain_forward(bases, kind, case):
    batch, _ = draw_batch(case)
    for recompute in (False, True):
        model = build_model(bases[kind], "causal", placement_of(case), recompute=recompute)
        wanted = plain_losses_and_gradients(bases[kind], model, batch)
        assert_same(losses_and_gradients(model, hold(model, batch)), wanted)


def test_the_architectures_that_compute_attention_by_segments_are_those_that_can(bases):
    uses = {kind: build_model(bases[kind], "causal", "prefix").uses_segments for kind in KINDS}
    assert [kind for kind in KINDS if not uses[kind]] == ["bloom", "gemma2"]


@pytest.mark.parametrize("placement", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_a_seq2seq_base_is_its_plain_forward_in_both_placements(bases, kind, placement):
    batch, _ = draw_batch(placement)
    for recompute in (False, True):
        model = build_model(bases[kind], "seq2seq", placement, recompute=recompute)
        wanted = plain_losses_and_gradients(bases[kind], model, batch)
        assert_same(losses_and_gradients(model, hold(model, batch)), wanted)
        reader = build_reader(model)
        cold, warm = (losses_and_gradients(model, reader.hold(batch)) for _ in range(2))
        assert_same(cold, wanted)
        assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))
        assert (reader.cache.hits, reader.cache.misses) == ((6, 6) if placement == "decoder" else (0, 0))


@pytest.mark.parametrize("with_lead", extended_beyond([True], [False, True]))
@pytest.mark.parametrize("case", ["infix", "shared", "template"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "bloom", "qwen2_window", "gemma2", "deepseek_v3"])
def test_contexts_cold_warm_and_after_a_lead_give_the_plain_forward(bases, kind, case, with_lead):
    batch, lead = draw_batch(case)
    model = build_model(bases[kind], "causal", placement_of(case))
    wanted = plain_losses_and_gradients(bases[kind], model, batch)
    reader = build_reader(model, lead if with_lead else None)
    cold, warm = (losses_and_gradients(model, reader.hold(batch)) for _ in range(2))
    assert_same(cold, wanted)
    assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))
    is_lead = case == "shared" and with_lead and model.uses_segments  # is known without the cache
    num = 0 if is_lead else 1 if case == "shared" else 6
    assert (reader.cache.hits, reader.cache.misses) == (num, num)
    without = build_reader(model, lead if with_lead else None, cache=False)
    assert_same(losses_and_gradients(model, without.hold(batch)), wanted)


def test_a_row_that_does_not_begin_with_the_lead_stands_beside_those_that_do(bases):
    batch, lead = draw_batch("template")
    contexts = [lead, draw_tokens(np.random.default_rng(1), 12), lead[:4], *batch.contexts[3:]]
    batch = Batch(contexts, batch.rests, batch.targets, batch.readers, 1)
    for kind in ("llama", "gpt2", "bloom", "mistral_window"):
        model = build_model(bases[kind], "causal", "template")
        wanted = plain_losses_and_gradients(bases[kind], model, batch)
        for cache in (True, False):
            reader = build_reader(model, lead, cache=cache)
            assert_same(losses_and_gradients(model, reader.hold(batch)), wanted)
            assert_same(losses_and_gradients(model, reader.hold(batch)), wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bloom", "qwen2_window", "opt"])
def test_text_blocks_and_targets_of_one_token_are_predicted_from_the_last_virtual_token_on(bases, kind):
    draw, nothing = np.random.default_rng(2), np.zeros(0, np.int32)
    targets = [draw_tokens(draw, count) for count in (1, 30, 30, 12, 1)]
    batch = Batch([nothing] * 5, [nothing] * 5, targets, [(i, m) for i in range(5) for m in (0, 1)], 1)
    model = build_model(bases[kind], "causal", "prefix")
    assert_same(losses_and_gradients(model, batch), plain_losses_and_gradients(bases[kind], model, batch))
    alone = Batch([nothing], [nothing], targets[:1], [(0, 1), (0, 0)], 1)  # no live position but virtual tokens
    assert_same(losses_and_gradients(model, alone), plain_losses_and_gradients(bases[kind], model, alone))
    context = Batch([draw_tokens(draw, 15)], [nothing], targets[:1], [(0, 0), (0, 1)], 1)
    wanted = plain_losses_and_gradients(bases[kind], model, context)
    assert_same(losses_and_gradients(model, hold(model, context)), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_one_row_and_rows_with_the_same_context_twice_are_no_special_case(bases, kind):
    batch, lead = draw_batch("template")
    twice = [batch.contexts[0], lead, batch.contexts[0], lead, lead, batch.contexts[1]]
    some = Batch(twice, batch.rests, batch.targets, batch.readers, 1)
    model = build_model(bases[kind], "causal", "template")
    for one in (some, Batch(twice[:1], batch.rests[:1], batch.targets[1:2], [(0, 1), (0, 0)], 1)):
        wanted = plain_losses_and_gradients(bases[kind], model, one)
        assert_same(losses_and_gradients(model, build_reader(model).hold(one)), wanted)
        assert_same(losses_and_gradients(model, hold(model, one)), wanted)


@pytest.mark.parametrize("case", [*CASES, "encoder", "decoder"])
@pytest.mark.parametrize("value", extended_beyond([float("inf")], [float("inf"), float("nan"), 3e38]))
def test_a_member_that_is_not_finite_leaves_the_others_bitwise_as_they_were(bases, case, value):
    is_seq2seq = case in ("encoder", "decoder")
    for kind in SEQ2SEQ if is_seq2seq else ("gpt2", "llama", "qwen2_window", "bloom"):
        readers = [(i, m) for i in range(6) for m in (0, 1, 2) if (i, m) not in ((2, 2), (4, 0))]
        batch, _ = draw_batch(case, readers=readers)
        model = build_model(
            bases[kind], "seq2seq" if is_seq2seq else "causal", placement_of(case), num_virtual=(4, 7, 3)
        )
        batch = hold(model, batch)
        sound = losses_and_gradients(model, batch)
        model.prompts[1].virtual_tokens.data[2:] = value
        broken = losses_and_gradients(model, batch)
        of_others = torch.tensor([member != 1 for _, member in readers])
        assert torch.equal(broken[0][of_others], sound[0][of_others]), kind
        assert torch.equal(broken[1], sound[1]) and torch.equal(broken[3], sound[3]), kind


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("cache", [True, False])
def test_rows_without_a_context_stand_among_rows_with_one(bases, kind, cache):
    full, lead = draw_batch("template")
    contexts = [tokens if row % 2 else tokens[:0] for row, tokens in enumerate(full.contexts)]
    rests = [rest if len(rest) else full.contexts[0] for rest in full.rests]
    for mixed in (contexts, [tokens[:0] for tokens in contexts]):
        batch = dataclasses.replace(full, contexts=mixed, rests=rests)
        model = build_model(bases[kind], "causal", "template")
        reader = build_reader(model, lead=lead, cache=cache)
        wanted = plain_losses_and_gradients(bases[kind], model, batch)
        for _ in range(2):  # cold, then warm
            assert_same(losses_and_gradients(model, reader.hold(batch)), wanted)
