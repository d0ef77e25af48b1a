"""Labels are scored after one pass over their input, and their losses are those of whole plain forwards."""

import dataclasses

import numpy as np
import pytest
import torch

from ptune_dist.data.batches import Batch
from ptune_dist.data.label_tree import LabelTree, build_label_tree
from ptune_dist.model.attention_flex import FlexSegments
from tests.conftest import ARCHITECTURES, SEQ2SEQ
from tests.numerics.passes import (
    build_base,
    build_model,
    draw_batch,
    draw_tokens,
    hold,
    placement_of,
    plain_causal_logits,
    plain_seq2seq_logits,
)

# Labels that begin alike, one that begins another, one of a single token, one that no other resembles.
LABELS = [[7, 8, 9, 0], [7, 8, 9, 4, 0], [7, 8], [7, 11, 0], [5], [20, 21, 22, 23, 24, 0], [7, 8, 9, 5, 6, 0]]
CASES = ["prefix", "infix", "shared", "template"]
MORE = ["mistral_window", "granite", "deepseek_v2", "deepseek_v3"]
KINDS = [kind for kind in ARCHITECTURES if kind != "bloom"] + MORE


def label_batch(case: str, labels: list[list[int]] = LABELS) -> Batch:
    """Rows of very different length for two members, with all labels but for one row, which has three of them."""
    batch, _ = draw_batch(case)
    trees = [build_label_tree(labels)] * len(batch.rests)
    trees[1] = build_label_tree(labels[2:5])
    return dataclasses.replace(batch, targets=[np.zeros(0, np.int32)] * len(trees), trees=trees)


def words_of(tree: LabelTree) -> list[list[int]]:
    return [tree.targets[path].tolist() for path in tree.paths]


@torch.no_grad()
def plain_losses(base, model, batch: Batch) -> list[np.ndarray]:
    """Every label of every reader alone, the whole text in one piece."""
    forward = plain_seq2seq_logits if base.config.is_encoder_decoder else plain_causal_logits
    found = []
    for row, member in batch.readers:
        prompt = model.prompts[member].virtual_tokens
        losses = []
        for label in words_of(batch.trees[row]):
            target = torch.tensor(label)
            logits = forward(base, prompt, batch.contexts[row], batch.rests[row], target.numpy())
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum").item())
        found.append(np.array(losses))
    return found


def assert_losses(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_of_labels_gives_the_losses_of_plain_forwards(kind, case):
    base = build_base(kind)
    model = build_model(base, "causal", placement_of(case))
    batch = label_batch(case)
    wanted = plain_losses(base, model, batch)
    with torch.no_grad():
        assert_losses(model.label_losses(hold(model, batch)), wanted)
    model.head._chunk = 3
    with torch.no_grad():
        assert_losses(model.label_losses(hold(model, batch)), wanted)


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *((kind, case) for kind in ("bloom", "gemma2") for case in CASES),
        *((kind, case) for kind in SEQ2SEQ for case in ("encoder", "decoder")),
    ],
)
def test_labels_one_by_one_after_their_inputs_give_the_losses_of_plain_forwards(kind, case):
    base = build_base(kind)
    model = build_model(base, "seq2seq" if kind in SEQ2SEQ else "causal", placement_of(case))
    batch = label_batch(case)
    wanted = plain_losses(base, model, batch)
    with torch.no_grad():
        read = model.read_inputs(hold(model, batch))
        assert read.read is not None and not model.scores_trees
        read = dataclasses.replace(
            read, held=None, rests=[np.zeros(0, np.int32)] * len(batch.rests)
        )  # not needed again
        for number, label in enumerate(LABELS):
            has_it = [number in range(2, 5) if row == 1 else True for row in range(len(batch.rests))]
            targets = [np.array(label if one else [], np.int32) for one in has_it]
            losses = model.losses(dataclasses.replace(read, targets=targets)).tolist()
            for reader, (row, _) in enumerate(batch.readers):
                expected = wanted[reader][number - 2 if row == 1 else number] if has_it[row] else 0.0
                assert losses[reader] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral_window", "deepseek_v3"])
def test_runs_of_a_tree_are_segments_that_flex_attention_reads(kind, monkeypatch):
    def build_flex(segments, trees, outside, device):
        return FlexSegments([*segments, *(run for tree in trees for run in tree.segments())], outside, device)

    base = build_base(kind)
    model = build_model(base, "causal", "prefix")
    batch = label_batch("prefix")
    wanted = plain_losses(base, model, batch)
    monkeypatch.setattr("ptune_dist.families.causal.build_tree_attention", build_flex)
    with torch.no_grad():
        assert_losses(model.label_losses(batch), wanted)


def test_a_tree_in_tiles_and_labels_without_an_input_give_the_same(monkeypatch):
    draw = np.random.default_rng(4)
    labels = [draw_tokens(draw, 4).tolist() for _ in range(40)]
    base = build_base("llama")
    model = build_model(base, "causal", "prefix")
    nothing = np.zeros(0, np.int32)
    monkeypatch.setattr("ptune_dist.data.label_tree.TILE_TOKENS", 16)
    tree = build_label_tree(labels)
    batch = Batch([nothing] * 2, [nothing, draw_tokens(draw, 9)], [nothing] * 2, [(0, 1), (1, 0)], 1, trees=[tree] * 2)
    assert len(tree.tiles) > 4
    with torch.no_grad():
        assert_losses(model.label_losses(batch), plain_losses(base, model, batch))


def test_a_tree_has_each_beginning_once_and_every_label_is_a_path():
    tree = build_label_tree(LABELS)
    assert words_of(tree) == LABELS
    assert sorted(tree.tokens.tolist()) == sorted([7, 8, 9, 4, 5, 6, 11, 20, 21, 22, 23, 24])
    assert tree.depths.max() == 4 and len(tree.runs) == 6
    empty = build_label_tree([])
    assert not len(empty.tokens) and empty.paths == [] and empty.runs == [] and empty.tiles == []
