"""A model with an attached prompt does what plain transformers does with the same vectors, or keys and values, by hand.

Shapes: B rows, T tokens, P positions of the prompt, D width, V vocabulary.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from ptune_dist.api.attach import attach
from ptune_dist.errors import UserError
from tests.conftest import ARCHITECTURES, SEQ2SEQ
from tests.numerics.passes import build_base, draw_tokens
from tests.numerics.prefixes import draw_prefix, plain_prefix_logits

NUM_VIRTUAL = 4
LENGTHS = (9, 3, 6)
PAD = 1
WINDOWED = ("gemma2", "mistral_window")


def facts_of(base: PreTrainedModel, **more: Any) -> dict[str, Any]:
    family = "seq2seq" if base.config.is_encoder_decoder else "causal"
    known = {
        "family": family,
        "model_type": base.config.model_type,
        "num_layers": base.config.get_text_config(decoder=True).num_hidden_layers,
    }
    placement = "encoder" if family == "seq2seq" else "prefix"
    width = base.get_input_embeddings().embedding_dim
    return {"method": "prompt_tuning", "placement": placement, "width": width, "base": known} | more


def draw_vectors(base: PreTrainedModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(NUM_VIRTUAL, base.get_input_embeddings().embedding_dim, generator=draw) * 0.5


def draw_rows() -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw_tokens(draw, length) for length in LENGTHS]


def pad_rows(rows: list[np.ndarray], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids = np.stack([np.pad(row, pad, constant_values=PAD) for row, pad in zip(rows, pads, strict=True)])
    mask = np.stack([np.pad(np.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    return {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}


def plain_logits(base: PreTrainedModel, vectors: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
    """[T, V] of one text, alone, after the virtual tokens."""
    own = base.get_input_embeddings()(torch.from_numpy(tokens).long())
    return base(inputs_embeds=torch.cat([vectors, own])[None], use_cache=False).logits[0, len(vectors) :]


def plain_answer(base: PreTrainedModel, vectors: torch.Tensor, tokens: np.ndarray, count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found.append(int(plain_logits(base, vectors, np.append(tokens, found).astype(np.int64))[-1].argmax()))
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", [*ARCHITECTURES, *WINDOWED, "granite"])
def test_virtual_tokens_stand_before_the_rows_of_a_causal_model(kind):
    base = build_base(kind)
    vectors = draw_vectors(base)
    rows = draw_rows()
    expected = [plain_logits(base, vectors, row) for row in rows]
    answers = [plain_answer(base, vectors, row, 3) for row in rows]
    before = base(**pad_rows(rows, "right")).logits
    attached = attach(base, {"virtual_tokens": vectors}, facts_of(base))
    found = base(**pad_rows(rows, "right")).logits
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own[: len(wanted)], wanted, rtol=1e-4, atol=2e-5)
    base.generation_config.eos_token_id = None
    how = {"max_new_tokens": 3, "do_sample": False}
    if kind in WINDOWED:
        with pytest.raises(UserError, match="give rows of one length, or one row at a time"):
            base.generate(**pad_rows(rows, "left"), **how)
        found = [base.generate(**pad_rows([row], "left"), **how)[0, len(row) :].tolist() for row in rows]
    else:
        ids = base.generate(**pad_rows(rows, "left"), **how)
        assert ids[:, : max(LENGTHS)].equal(pad_rows(rows, "left")["input_ids"])
        found = ids[:, max(LENGTHS) :].tolist()
    assert found == answers
    attached.detach()
    assert base(**pad_rows(rows, "right")).logits.equal(before)
    assert "forward" not in vars(base) and "generate" not in vars(base)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_a_prefix_is_read_before_the_rows(kind):
    base = build_base(kind)
    prefix = draw_prefix(base, NUM_VIRTUAL)
    rows = draw_rows()
    nothing = np.zeros(0, np.int64)
    expected = [plain_prefix_logits(base, prefix(), nothing, row[:1], row[1:]) for row in rows]
    tensors = {name: tensor.detach() for name, tensor in prefix.plain().items()}
    with attach(base, tensors, facts_of(base, method="prefix_tuning")):
        found = base(**pad_rows(rows, "right")).logits
    for own, wanted, row in zip(found, expected, rows, strict=True):
        torch.testing.assert_close(own[: len(row) - 1], wanted, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_virtual_tokens_stand_before_the_input_of_an_encoder(kind):
    base = build_base(kind)
    vectors = draw_vectors(base)
    rows = draw_rows()
    inputs = pad_rows(rows, "right")
    embedded = base.get_encoder().get_input_embeddings()(inputs["input_ids"])
    mask = torch.cat([inputs["attention_mask"].new_ones(len(rows), NUM_VIRTUAL), inputs["attention_mask"]], dim=1)
    by_hand = {
        "inputs_embeds": torch.cat([vectors.expand(len(rows), -1, -1), embedded], dim=1),
        "attention_mask": mask,
    }
    labels = torch.from_numpy(np.stack([draw_tokens(np.random.default_rng(2), 5) for _ in rows])).long()
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    expected = base(**by_hand, labels=labels)
    answers = base.generate(**by_hand, **how)
    with attach(base, {"virtual_tokens": vectors}, facts_of(base)):
        found = base(**inputs, labels=labels)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found.loss, expected.loss)
        assert base.generate(**inputs, **how).equal(answers)
    assert not base(**inputs, labels=labels).logits.allclose(expected.logits, rtol=1e-2)


@torch.no_grad()
def test_options_of_generate_count_what_the_user_gave():
    base = build_base("llama")
    vectors = draw_vectors(base)
    inputs = pad_rows(draw_rows(), "left")
    width = inputs["input_ids"].shape[1]
    base.generation_config.eos_token_id = None
    embedded = torch.cat([vectors.expand(3, -1, -1), base.get_input_embeddings()(inputs["input_ids"])], dim=1)
    mask = torch.cat([inputs["attention_mask"].new_ones(3, NUM_VIRTUAL), inputs["attention_mask"]], dim=1)
    beams = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = base.generate(inputs_embeds=embedded, attention_mask=mask, **beams)
    with attach(base, {"virtual_tokens": vectors}, facts_of(base)):
        assert base.generate(**inputs, **beams)[:, width:].equal(expected)
        assert base.generate(**inputs, max_length=width + 2, do_sample=False).shape[1] == width + 2
        found = base.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        assert found.sequences.shape[1] == width + 2
        with pytest.raises(UserError, match="give input_ids"):
            base.generate(inputs_embeds=embedded)


@torch.no_grad()
def test_calls_with_a_cache_of_the_users_own_go_on_from_it():
    base = build_base("gpt2")
    row = draw_rows()[0]
    ids = torch.from_numpy(row).long()[None]
    vectors = draw_vectors(base)
    expected = plain_logits(base, vectors, row)
    with attach(base, {"virtual_tokens": vectors}, facts_of(base)):
        first = base(ids[:, :4], use_cache=True)
        rest = base(ids[:, 4:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(ids))
        again = base(ids, position_ids=torch.arange(len(row))[None])
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1)[0], expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(again.logits[0], expected, rtol=1e-4, atol=2e-5)


def test_the_prompt_takes_the_models_dtype_and_gradients_pass():
    base = build_base("llama").to(torch.bfloat16)
    ids = torch.from_numpy(draw_rows()[0]).long()[None]
    with attach(base, {"virtual_tokens": draw_vectors(base)}, facts_of(base)):
        base.get_input_embeddings().weight.requires_grad_(True)
        found = base(ids, labels=ids)
        found.loss.backward()
    assert found.logits.dtype == torch.bfloat16
    assert base.get_input_embeddings().weight.grad.abs().sum() > 0


def test_trained_tensors_of_the_base_are_put_in_and_taken_out():
    base = build_base("llama")
    before = copy.deepcopy(base.state_dict())
    tensors = {"base.model.norm.weight": torch.full((32,), 0.5)}
    with attach(base, tensors, facts_of(base, method="norms_only")):
        assert base.model.norm.weight.eq(0.5).all()
    rows = {"trainable_tokens": torch.ones(2, 32), "token_indices": torch.tensor([5, 9])}
    with attach(base, rows, facts_of(base, method="trainable_tokens")):
        changed = base.get_input_embeddings().weight[[5, 9, 6]]
        assert changed[:2].eq(1).all() and not changed[2].eq(1).any()
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ("virtual_tokens", {"width": 64}, "over a base with width 64, this has 32"),
        ("virtual_tokens", {"placement": "infix"}, "this prompt's placement is infix, not before a text"),
        ("late_tokens", {"method": "late_prompt"}, "a prompt of late_prompt is more than virtual tokens"),
        ("value_head.weight", {}, "trained with a head of its own"),
    ],
)
def test_what_cannot_be_attached_is_refused_in_one_line(tensors, facts, message):
    base = build_base("llama")
    with pytest.raises(UserError, match=message):
        attach(base, {tensors: torch.zeros(4, 32)}, facts_of(base) | facts)
    with (
        attach(base, {"virtual_tokens": torch.zeros(4, 32)}, facts_of(base)),
        pytest.raises(UserError, match="has a prompt already"),
    ):
        attach(base, {"virtual_tokens": torch.zeros(4, 32)}, facts_of(base))
