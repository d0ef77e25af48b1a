"""The head at targets alone, a chunk at a time: the same losses and gradients, and no logits of other positions."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import ptune_dist.model.head
from ptune_dist.model.from_head import Bypass, FromHead
from ptune_dist.model.head import FP16_SCALE, Chunks, LossesWithGradient
from ptune_dist.objectives.cross_entropy import CrossEntropy
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
    monkeypatch.setattr(model.objective, "losses", None)
    with pytest.raises(TypeError):
        model.losses(batch)
    torch.testing.assert_close(model.base(ids).logits, base(ids).logits)  # of all positions


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_each_objective_has_the_gradients_of_logits_that_are_kept(monkeypatch, smoothing):
    batch, _ = draw_batch("prefix")
    monkeypatch.setattr(ptune_dist.model.head, "CHUNK_BYTES", 4 * NUM_LABELS * CHUNK)
    _, model = model_of("gemma2", "prefix")
    model.objective = CrossEntropy(smoothing)
    ours = losses_and_gradients(model, batch)

    def kept(asked, loss_of):
        return loss_of(model.head._from_head.logits(model.head.hidden(asked)), asked.targets)

    monkeypatch.setattr(model.head, "losses", kept)
    assert_same(ours, losses_and_gradients(model, batch), rel=2e-6)


@pytest.mark.parametrize("num_targets", [0, 1, 7])
def test_any_number_of_targets_takes_one_call_of_every_module(monkeypatch, num_targets):
    monkeypatch.setattr(ptune_dist.model.head, "CHUNK_BYTES", 4 * NUM_LABELS)
    _, model = model_of("llama", "prefix")
    batch, _ = draw_batch("prefix", (9,), readers=[(0, 0)])
    batch.targets[0] = np.arange(5, 5 + num_targets, dtype=np.int32)
    calls: list[str] = []
    for name, module in model.base.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses = model.losses(batch)
    losses.sum().backward()
    assert len(calls) == len(set(calls)) and "lm_head" in calls and "" in calls


def test_float16_keeps_gradients_that_are_smaller_than_its_smallest_number():
    weight = torch.eye(4, dtype=torch.float16)
    hidden = torch.tensor([[18.0, 0, 0, 0], [19.0, 0, 1, 0]], dtype=torch.float16, requires_grad=True)
    targets = torch.tensor([0, 0])
    chunks = Chunks(lambda part: part @ weight.T, CrossEntropy().losses, targets, 1)
    loss_scale = 2.0**16
    (LossesWithGradient.apply(hidden, chunks).sum() * loss_scale).backward()
    exact = hidden.detach().double().requires_grad_()
    (functional.cross_entropy(exact, targets, reduction="sum") * loss_scale).backward()
    assert hidden.grad[:, 1:].min() > 0
    assert math.frexp(FP16_SCALE)[0] == 0.5  # a power of two, so that scaling rounds nothing
    torch.testing.assert_close(hidden.grad[:, 1:].double(), exact.grad[:, 1:], rtol=5e-3, atol=0)


def test_tokens_are_scored_at_any_positions_and_logits_are_the_bases(monkeypatch):
    monkeypatch.setattr(ptune_dist.model.head, "CHUNK_BYTES", 4 * NUM_LABELS * CHUNK)
    _, model = model_of("cohere", "prefix")
    asked = model.supervise(draw_batch("prefix")[0])
    logits = model.head.logits(asked)
    places = np.array([0, 0, 2, 3, 3, 3, 11])
    tokens = np.array([5, 6, 7, 8, 9, 200, 10])
    found = model.head.token_losses(asked, places, tokens, CrossEntropy().losses)
    wanted = functional.cross_entropy(logits[places], torch.from_numpy(tokens), reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    own = model.head.losses(asked, CrossEntropy().losses)
    torch.testing.assert_close(functional.cross_entropy(logits, asked.targets, reduction="none"), own)


def test_numbers_that_a_base_reads_below_its_head_are_found_there():
    inner = torch.nn.Linear(2, 3)
    bypass = Bypass(torch.ones(1, 5, 2), inner)
    assert bypass.out_features == 3 and bypass.weight is inner.weight
    assert list(bypass.parameters()) == [] and bypass().last_hidden_state.shape == (1, 5, 2)
    with pytest.raises(AttributeError):
        _ = bypass.no_such_name


BELOW_THE_HEAD = {"bert": {"is_decoder": True}, "electra": {"is_decoder": True}, "falcon": {}, "mamba": {}}


@pytest.mark.parametrize("kind", [*CAUSAL, *SEQ2SEQ, *BELOW_THE_HEAD])
def test_what_a_base_does_from_its_head_on_is_its_own(kind):
    wide = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 272}
    if kind in BELOW_THE_HEAD:
        config = AutoConfig.for_model(kind, **wide, **BELOW_THE_HEAD[kind])
        base = AutoModelForCausalLM.from_config(config).eval()
    else:
        base = build_base(kind)
    taken: list[torch.Tensor] = []
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    logits = base(input_ids=torch.arange(5, 11)[None], **decoder_inputs(base)).logits
    hook.remove()
    modules = dict(base.named_modules())
    torch.testing.assert_close(FromHead(base).logits(taken[0][0]), logits[0], rtol=1e-6, atol=1e-6)
    assert dict(base.named_modules()) == modules


def decoder_inputs(base) -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": torch.arange(5, 11)[None]} if base.config.is_encoder_decoder else {}
