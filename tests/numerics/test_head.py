"""The head at targets alone, a chunk at a time: the same losses and gradients, and no logits of other positions."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ptune_dist.model.head
from ptune_dist.run.metrics_log import read_metrics
from tests.conftest import SEQ2SEQ
from tests.numerics.banks import train_all, write_bank, write_rows
from tests.numerics.passes import (
    assert_same,
    build_base,
    build_model,
    draw_batch,
    hold,
    losses_and_gradients,
    plain_losses_and_gradients,
)
from tests.numerics.test_curves import zero_json

NUM_LABELS = 272  # of every tiny base
WIDTHS = ((16,), (32,))  # of their heads
CHUNK = 3  # tokens
CAUSAL = ["llama", "gpt2", "opt", "gemma2", "cohere", "granite"]


class Widest(TorchDispatchMode):
    """Counts the most rows of logits in any one tensor that is made, in forward or backward."""

    def __init__(self):
        super().__init__()
        self.num_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and is_logits(leaf):
                self.num_rows = max(self.num_rows, math.prod(leaf.shape[:-1]))
        return out


def is_logits(tensor: torch.Tensor) -> bool:
    """Not the head's weight turned round: that is as long as a base is wide."""
    return tensor.shape[-1:] == (NUM_LABELS,) and tensor.shape[:-1] not in WIDTHS


def model_of(kind: str, placement: str):
    base = build_base(kind)
    return base, build_model(base, "seq2seq" if kind in SEQ2SEQ else "causal", placement)


CASES = [(kind, placement) for kind in CAUSAL for placement in ("prefix", "infix")]
CASES += [(kind, placement) for kind in SEQ2SEQ for placement in ("encoder", "decoder")]


@pytest.mark.parametrize("kind, placement", CASES)
def test_chunks_change_neither_loss_nor_gradient_and_no_other_logits_exist(monkeypatch, kind, placement):
    batch, _ = draw_batch(placement)
    base, whole = model_of(kind, placement)
    monkeypatch.setattr(ptune_dist.model.head, "CHUNK_BYTES", 4 * NUM_LABELS * CHUNK)
    _, chunked = model_of(kind, placement)
    num_supervised = sum(len(batch.targets[row]) for row, _ in batch.readers)
    assert num_supervised > 6 * CHUNK and (num_supervised,) not in WIDTHS
    found = []
    for model, most in ((whole, num_supervised), (chunked, CHUNK)):
        held = hold(model, batch)
        with Widest() as widest:
            found.append(losses_and_gradients(model, held))
        assert widest.num_rows == most
    wanted = plain_losses_and_gradients(base, whole, batch)
    assert_same(found[0], wanted)
    assert_same(found[1], wanted)
    assert_same(found[1], found[0], rel=2e-6)


def test_chunks_with_recomputed_layers_and_without_gradient_are_the_same(monkeypatch):
    batch, _ = draw_batch("prefix")
    monkeypatch.setattr(ptune_dist.model.head, "CHUNK_BYTES", 4 * NUM_LABELS * CHUNK)
    for kind in ("granite", "t5"):
        base, model = model_of(kind, "encoder" if kind == "t5" else "prefix")
        recomputed = build_model(base, "seq2seq" if kind == "t5" else "causal", model.placement, recompute=True)
        wanted = losses_and_gradients(model, batch)
        assert_same(losses_and_gradients(recomputed, batch), wanted, rel=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(model.losses(batch), wanted[0], rtol=1e-6, atol=0)


@pytest.mark.long
def test_chunks_whose_number_differs_from_rank_to_rank_train_the_same_under_zero_3(tiny_bases, tmp_path):
    write_rows(tmp_path)
    script, cases = Path(__file__).with_name("chunks_many.py"), {"llama": "prefix", "gpt2": "infix", "t5": "encoder"}
    whole, chunked = (
        [
            write_bank(tmp_path, f"{name}-{kind}", tiny_bases[kind], {"seed": [0, 1]}, placement, deepspeed=deepspeed)
            for kind, placement in cases.items()
        ]
        for name, deepspeed in (("whole", zero_json(0)), ("chunked", zero_json(3)))
    )
    train_all(whole, tmp_path)
    train_all(chunked, tmp_path, num_ranks=2, script=script)
    for one, other in zip(whole, chunked, strict=True):
        losses = [[line["loss"] for line in read_metrics(tmp_path / config.stem)] for config in (one, other)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), other.stem


def test_a_failed_pass_leaves_the_head_as_it_was(monkeypatch):
    batch, _ = draw_batch("prefix")
    base, model = model_of("llama", "prefix")
    ids = torch.arange(5, 11)[None]
    monkeypatch.setattr(model.objective, "losses", fail)
    with pytest.raises(ValueError, match="in the objective"):
        model.losses(batch)
    torch.testing.assert_close(model.base(ids).logits, base(ids).logits)  # of all positions


def fail(_outputs: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
    raise ValueError("in the objective")
