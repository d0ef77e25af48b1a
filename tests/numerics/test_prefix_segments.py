"""Invariants 4 and 5 of keys and values: every placement against transformers with the same numbers handed over.

They stand between a context, which does not read them, and what follows; all rows of a pass read one copy.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as flex

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.data.batches import Batch, idle_batch
from ptune_dist.data.label_tree import build_label_tree
from ptune_dist.families import FAMILIES
from ptune_dist.model.attention import Segment
from ptune_dist.model.attention_flex import FlexSegments
from ptune_dist.model.attention_layouts import has_short_prefixes
from ptune_dist.model.layout import lay_out, plan_outside
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.prompt_tuning import PromptTuning
from tests.conftest import extended_beyond
from tests.numerics.passes import build_base, draw_batch, hold, placement_of, plain_causal_logits, weights_of
from tests.numerics.prefixes import draw_prefix, plain_prefix_logits, with_rests
from tests.numerics.test_labels import LABELS, label_batch, words_of
from tests.numerics.test_segments import build_reader

CASES = ["prefix", "infix", "shared", "template"]
KINDS = ["gpt2", "llama", "opt", "bloom", "qwen2_window", "mistral_window", "gemma2"]
OPTIONS = [{}, {"num_frozen": 1}, {"train_keys": False, "num_frozen": 2}, {"reparameterization": "mlp"}]
MLP_OF_VALUES = {"reparameterization": "mlp", "train_keys": False, "num_frozen": 1, "encoder_hidden_size": 5}


@pytest.fixture(scope="module")
def bases() -> dict:
    return {kind: build_base(kind) for kind in KINDS}


def build_model(base, prompts: list[Method], case: str, *, recompute: bool = False) -> PromptedModel:
    base = copy.deepcopy(base)
    if recompute:
        Recomputer(DEFAULTS, layers_of(base))
    return FAMILIES["causal"].model_class(base, prompts, CrossEntropy(), placement_of(case)).train()


def ours(model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """Losses [S] and the gradient of every parameter of every prompt."""
    model.zero_grad()
    losses = model.losses(batch)
    (losses * weights_of(batch)).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.prompts.parameters())]


def plain(base, model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """What `ours` should give: each reader's text alone."""
    model.zero_grad()
    losses = []
    for row, member in batch.readers:
        parts = batch.contexts[row], batch.rests[row], batch.targets[row]
        found = model.prompt(member)()
        logits = (
            plain_prefix_logits(base, found, *parts)
            if found.vectors is None
            else plain_causal_logits(base, found.vectors, *parts)
        )
        target = torch.from_numpy(batch.targets[row]).long()
        losses.append(nn.functional.cross_entropy(logits, target, reduction="sum"))
    whole = torch.stack(losses)
    (whole * weights_of(batch)).sum().backward()
    return [whole.detach(), *(p.grad.clone() for p in model.prompts.parameters())]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert other.abs().max() > 1e-3  # the prompt is felt
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_transformers_with_the_same_keys_and_values(bases, kind, case):
    batch = with_rests(draw_batch(case)[0])
    for recompute in (False, True):
        prompts = [draw_prefix(bases[kind], count, OPTIONS[count % 2], seed=count) for count in (4, 7)]
        model = build_model(bases[kind], prompts, case, recompute=recompute)
        assert_same(ours(model, hold(model, batch)), plain(bases[kind], model, batch))


@pytest.mark.parametrize("kind", ["llama", "mistral_window"])
def test_rows_that_are_shorter_than_the_prefix_read_one_copy_of_it(bases, kind):
    batch = draw_batch("prefix", lengths=(1, 2, 1, 2, 1, 2))[0]
    model = build_model(bases[kind], [draw_prefix(bases[kind], count) for count in (9, 12)], "prefix")

    def segments_of(batch: Batch) -> list[Segment]:
        return lay_out(batch, model.num_vectors, plan_outside(batch, model.num_prefix)).segments

    assert not has_short_prefixes(segments_of(batch))
    assert_same(ours(model, batch), plain(bases[kind], model, batch))
    assert has_short_prefixes(segments_of(draw_batch("prefix")[0]))
    assert not has_short_prefixes(segments_of(with_rests(draw_batch("infix")[0])))


@pytest.mark.parametrize("options", [*OPTIONS[2:], MLP_OF_VALUES])
def test_what_is_trained_of_keys_and_values_gets_their_gradient_and_the_rest_stays(bases, options):
    batch = with_rests(draw_batch("infix")[0])
    model = build_model(bases["llama"], [draw_prefix(bases["llama"], count, options) for count in (4, 7)], "infix")
    assert_same(ours(model, hold(model, batch)), plain(bases["llama"], model, batch))
    named = [name for name, _ in model.prompts[0].named_parameters()]
    assert named == (["prefix_values"] if "reparameterization" not in options else
                     ["embedding.weight", "transform.0.weight", "transform.0.bias", "transform.2.weight",
                      "transform.2.bias"])  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_frozen": 1, "reparameterization": "mlp"}])
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "llama"])
def test_keys_and_values_of_a_text_are_read_as_that_text_whatever_their_widths(kind, options):
    """transformers' cache has latents for some of these bases, so the text itself is what they are held against."""
    base = build_base(kind)
    batch = with_rests(draw_batch("prefix", readers=[(row, 0) for row in range(6)])[0])
    text = np.arange(20, 26)
    model = build_model(base, [draw_prefix(base, 6, options)], "prefix")
    prompt = model.prompt(0)
    if options:
        nn.init.zeros_(prompt.transform[-1].weight)
        nn.init.zeros_(prompt.transform[-1].bias)
    prompt.begin_from(*model.read_contexts(Contexts([text], 1))[0])
    vectors = base.get_input_embeddings()(torch.from_numpy(text))
    wanted = []
    for row, _ in batch.readers:
        logits = plain_causal_logits(base, vectors, batch.contexts[row], batch.rests[row], batch.targets[row])
        target = torch.from_numpy(batch.targets[row]).long()
        wanted.append(nn.functional.cross_entropy(logits, target, reduction="sum"))
    torch.testing.assert_close(model.losses(batch), torch.stack(wanted), rtol=1e-5, atol=0)
    gradients = ours(model, batch)[1:]
    assert all(gradient.isfinite().all() for gradient in gradients) and gradients[-1].any()


@pytest.mark.parametrize("with_lead", [False, True])
@pytest.mark.parametrize("case", ["infix", "shared", "template"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mistral_window"])
def test_contexts_cold_warm_and_after_a_lead_give_the_plain_pass(bases, kind, case, with_lead):
    batch, lead = draw_batch(case)
    batch = with_rests(batch)
    model = build_model(bases[kind], [draw_prefix(bases[kind], count) for count in (4, 7)], case)
    reader = build_reader(model, lead if with_lead else None)
    wanted = plain(bases[kind], model, batch)
    cold, warm = (ours(model, reader.hold(batch)) for _ in range(2))
    assert_same(cold, wanted)
    assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))
    without = build_reader(model, lead if with_lead else None, cache=False)
    assert_same(ours(model, without.hold(batch)), wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "mistral_window", "bloom"])
def test_members_of_several_methods_in_one_pass_are_each_as_alone(bases, kind, case):
    base = bases[kind]
    batch = with_rests(draw_batch(case, readers=[(row, member) for row in range(6) for member in (0, 1, 2)])[0])
    vectors = torch.randn(5, base.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(1))
    prompts = [draw_prefix(base, 4), PromptTuning(vectors * 0.5), draw_prefix(base, 6, OPTIONS[1], seed=1)]
    model = build_model(base, prompts, case)
    assert_same(ours(model, hold(model, batch)), plain(base, model, batch))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_member_that_is_not_finite_leaves_the_others_bitwise_as_they_were(bases, kind, case):
    readers = [(row, member) for row in range(6) for member in (0, 1, 2) if (row, member) not in ((2, 2), (4, 0))]
    batch = with_rests(draw_batch(case, readers=readers)[0])
    model = build_model(bases[kind], [draw_prefix(bases[kind], count) for count in (4, 7, 3)], case)
    batch = hold(model, batch)
    sound = ours(model, batch)
    for value in (float("nan"), 3e38):
        model.prompts[1].prefix_values.data[:, 2:] = value
        broken = ours(model, batch)
        of_others = torch.tensor([member != 1 for _, member in readers])
        assert torch.equal(broken[0][of_others], sound[0][of_others])
        assert all(torch.equal(broken[i], sound[i]) for i in (1, 2, 5, 6))


@pytest.mark.parametrize("has_contexts", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_rank_without_rows_computes_along(bases, kind, has_contexts):
    model = build_model(bases[kind], [draw_prefix(bases[kind], 4)], "infix" if has_contexts else "prefix")
    losses = model.losses(hold(model, idle_batch(1, has_contexts=has_contexts)))
    assert losses.tolist() == [0.0]
    losses.sum().backward()
    assert all(not p.grad.any() for p in model.prompts.parameters())


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_row_whose_input_is_one_token_has_no_context(bases, kind):
    batch, _ = draw_batch("infix")
    contexts = [batch.contexts[0][:1], *batch.contexts[1:]]
    batch = with_rests(Batch(contexts, batch.rests, batch.targets, batch.readers, 1))
    assert not len(batch.contexts[0]) and np.array_equal(batch.rests[0], contexts[0])
    model = build_model(bases[kind], [draw_prefix(bases[kind], count) for count in (4, 7)], "infix")
    wanted = plain(bases[kind], model, batch)
    assert_same(ours(model, build_reader(model).hold(batch)), wanted)


@torch.no_grad()
def plain_label_losses(base, model: PromptedModel, batch: Batch) -> list[list[float]]:
    """Every label of every reader alone."""
    found = []
    for row, member in batch.readers:
        losses = []
        for label in words_of(batch.trees[row]):
            parts = batch.contexts[row], batch.rests[row], np.array(label)
            logits = plain_prefix_logits(base, model.prompt(member)(), *parts)
            losses.append(nn.functional.cross_entropy(logits, torch.tensor(label), reduction="sum").item())
        found.append(losses)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "mistral_window"])
def test_a_tree_of_labels_gives_the_losses_of_plain_passes(bases, kind, case):
    model = build_model(bases[kind], [draw_prefix(bases[kind], count) for count in (4, 7)], case)
    batch = with_rests(label_batch(case))
    with torch.no_grad():
        found = model.label_losses(hold(model, batch))
    for ours, wanted in zip(found, plain_label_losses(bases[kind], model, batch), strict=True):
        assert ours.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["bloom", "gemma2"])
def test_labels_one_by_one_after_their_inputs_give_the_losses_of_plain_passes(bases, kind, case):
    model = build_model(bases[kind], [draw_prefix(bases[kind], count) for count in (4, 7)], case)
    batch = with_rests(label_batch(case, LABELS[:2]))
    batch = dataclasses.replace(batch, trees=[build_label_tree(LABELS[:2])] * len(batch.rests))
    wanted = plain_label_losses(bases[kind], model, batch)
    with torch.no_grad():
        read = model.read_inputs(hold(model, batch))
        for number, label in enumerate(LABELS[:2]):
            targets = [np.array(label, np.int32)] * len(batch.rests)
            losses = model.losses(dataclasses.replace(read, held=None, targets=targets)).tolist()
            assert losses == pytest.approx([some[number] for some in wanted], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", extended_beyond(["mistral_window"], ["llama", "mistral_window"]))
def test_flex_attention_reads_what_padded_calls_read(bases, kind, case, monkeypatch):
    batch = with_rests(draw_batch(case)[0])
    model = build_model(bases[kind], [draw_prefix(bases[kind], count) for count in (4, 7)], case)
    wanted = plain(bases[kind], model, batch)
    held = hold(model, batch)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)  # of a backward pass on a CPU
    monkeypatch.setattr(
        "ptune_dist.families.causal_segments.build_attention",
        lambda segments, outside, device, tables: FlexSegments(segments, outside, device),
    )
    assert_same(ours(model, held), wanted)
