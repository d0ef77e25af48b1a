"""Prefix keys and values of encoder-decoders: against plain passes of each row alone, and against PEFT's.

Shapes: L layers, P positions, G key/value heads, Dh width of a head, V vocabulary.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import DEFAULTS, Recomputer
from ptune_dist.data.batches import Batch, idle_batch
from ptune_dist.data.encode import TokenPair
from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.method import Contribution, Method
from ptune_dist.prompts.prefix_options import PrefixOptions
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.start import Start
from ptune_dist.run.parts import base_facts
from ptune_dist.tiny.make import build_tokenizer
from tests.conftest import SEQ2SEQ
from tests.evaluation.test_decoding import LENGTHS, MOST_TOKENS, decode, draw_inputs
from tests.numerics.passes import assert_same, build_base, draw_batch, hold, weights_of
from tests.numerics.test_segments import build_reader

PLACEMENTS = ["encoder", "decoder", "both"]


@pytest.fixture(scope="module")
def bases() -> dict:
    return {kind: build_base(kind) for kind in SEQ2SEQ}


def draw_prefix(base: PreTrainedModel, placement: str, num: int = 4, seed: int = 0, **options) -> PrefixTuning:
    """Random keys and values that are felt."""
    facts = base_facts(base)
    start = Start(
        "random", seed, build_tokenizer(), lambda ids: torch.zeros(len(ids), 1), asked="random", placement=placement
    )
    prompt = PrefixTuning.build(PrefixOptions(**options), num, facts, start)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.mul_(2.0)
    return prompt


def build_model(base: PreTrainedModel, prompts: list[Method], placement: str, recompute: bool = False) -> PromptedModel:
    base = copy.deepcopy(base)
    if recompute:
        Recomputer(DEFAULTS, layers_of(base))
    return FAMILIES["seq2seq"].model_class(base, prompts, CrossEntropy(), placement).train()


def batch_of(placement: str, readers=None) -> Batch:
    return draw_batch("decoder" if placement == "decoder" else "encoder", readers=readers)[0]


class Before(DynamicCache):
    """Of one layer of an encoder: a prefix [1, G, P, Dh] that is read before its own positions."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self._first = keys, values

    def update(self, key_states, value_states, *_):
        return tuple(torch.cat(pair, dim=2) for pair in zip(self._first, (key_states, value_states), strict=True))

    def get_seq_length(self, *_):
        return self._first[0].shape[2]


def pairs_of(keys: torch.Tensor | None, values: torch.Tensor | None) -> list[list[torch.Tensor]]:
    """Keys and values [1, G, P, Dh] of every layer; none where there are none."""
    if keys is None or values is None:
        return []
    return [[part.transpose(0, 1)[None] for part in pair] for pair in zip(keys, values, strict=True)]


def plain_logits(base: PreTrainedModel, prompt: Contribution, read: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """[T, V] of a target of T tokens, by transformers' own caches; an encoder's are put in its attentions' calls."""
    ids = torch.from_numpy(read).long()[None]
    mask = torch.ones_like(ids)
    by_layer = {
        "encoder": pairs_of(prompt.encoder_keys, prompt.encoder_values),
        "own": pairs_of(prompt.keys, prompt.values),
        "cross": pairs_of(prompt.cross_keys, prompt.cross_values),
    }
    hooks = []
    encoder = base.get_encoder()
    attentions = [m for m in encoder.modules() if hasattr(m, "k") or hasattr(m, "k_proj")]
    assert len(attentions) == base.config.num_hidden_layers
    for attention, pair in zip(attentions, by_layer["encoder"], strict=False):
        given = {"past_key_values": Before(*pair)}
        hooks.append(attention.register_forward_pre_hook(lambda _, a, k, g=given: (a, k | g), with_kwargs=True))
    longer = torch.ones(1, len(read) + (prompt.encoder_keys.shape[1] if hooks else 0))
    hidden = encoder(input_ids=ids, attention_mask=longer)
    for hook in hooks:
        hook.remove()
    caches = [DynamicCache(pairs) if pairs else DynamicCache() for pairs in (by_layer["own"], by_layer["cross"])]
    cache = EncoderDecoderCache(*caches)
    cache.is_updated = {}
    num_cross = prompt.cross_keys.shape[1] if by_layer["cross"] else 0
    written = torch.tensor([[base.config.decoder_start_token_id, *target[:-1].tolist()]])
    return base(
        encoder_outputs=hidden,
        attention_mask=torch.cat([mask.new_ones(1, num_cross), mask], dim=1),
        decoder_input_ids=written,
        past_key_values=cache,
        use_cache=True,
    ).logits[0]


def ours(model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """Losses [S], and the gradient of each parameter under weights that differ from reader to reader."""
    model.zero_grad()
    losses = model.losses(batch)
    (losses * weights_of(batch)).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.prompts.parameters())]


def plain_losses(base: PreTrainedModel, model: PromptedModel, batch: Batch) -> torch.Tensor:
    """[S], of every reader alone."""
    losses = []
    for row, member in batch.readers:
        read = np.concatenate([batch.contexts[row], batch.rests[row]])
        logits = plain_logits(base, model.prompt(member)(), read, batch.targets[row])
        target = torch.from_numpy(batch.targets[row]).long()
        losses.append(nn.functional.cross_entropy(logits, target, reduction="sum"))
    return torch.stack(losses)


def plain(base: PreTrainedModel, model: PromptedModel, batch: Batch) -> list[torch.Tensor]:
    """What `ours` should give."""
    model.zero_grad()
    losses = plain_losses(base, model, batch)
    (losses * weights_of(batch)).sum().backward()
    return [losses.detach(), *(None if p.grad is None else p.grad.clone() for p in model.prompts.parameters())]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_losses_and_gradients_are_those_of_plain_passes(bases, kind, placement):
    batch = batch_of(placement)
    base = bases[kind]
    more = {"num_frozen": 1, "reparameterization": "mlp", "encoder_hidden_size": 5}
    prompts = [draw_prefix(base, placement), draw_prefix(base, placement, seed=1, **more)]
    for recompute in (False, True):
        model = build_model(base, prompts, placement, recompute)
        assert_same(ours(model, hold(model, batch)), plain(base, model, batch))


@pytest.mark.parametrize("placement", ["encoder", "decoder"])
def test_members_of_several_methods_and_lengths_are_each_as_alone(bases, placement):
    base = bases["t5"]
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 0.5
    readers = [(row, member) for row in range(6) for member in (0, 1, 2)]
    batch = batch_of(placement, readers)
    model = build_model(
        base, [draw_prefix(base, placement), PromptTuning(vectors), draw_prefix(base, placement, 7, seed=1)], placement
    )
    found = ours(model, hold(model, batch))
    prefixes = dataclasses.replace(batch, readers=[pair for pair in readers if pair[1] != 1])
    is_prefix = torch.tensor([member != 1 for _, member in readers])
    wanted = plain(base, model, prefixes)
    torch.testing.assert_close(found[0][is_prefix], wanted[0], rtol=1e-5, atol=0)
    alone = build_model(base, [PromptTuning(vectors)], placement)
    own = dataclasses.replace(batch, readers=[(row, 0) for row in range(6)])
    torch.testing.assert_close(found[0][~is_prefix], alone.losses(hold(alone, own)).detach(), rtol=1e-5, atol=0)
    assert all(gradient.any() for gradient in found[1:])


def test_an_encoders_output_is_a_context_that_members_share(bases):
    base = bases["t5"]
    batch = batch_of("decoder", [(row, member) for row in range(6) for member in (0, 1)])
    model = build_model(base, [draw_prefix(base, "decoder"), draw_prefix(base, "decoder", seed=1)], "decoder")
    wanted = plain(base, model, batch)
    reader = build_reader(model)
    cold, warm = (ours(model, reader.hold(batch)) for _ in range(2))
    assert_same(cold, wanted)
    assert all(torch.equal(one, other) for one, other in zip(cold, warm, strict=True))
    assert (reader.cache.hits, reader.cache.misses) == (6, 6)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_a_start_from_a_text_is_what_the_base_computes_of_it(bases, kind):
    """The decoder after a prefix of [start, text] is the decoder that has written it, where it reads the same input."""
    base = bases[kind]
    text = np.arange(20, 26)
    batch = batch_of("decoder", [(row, 0) for row in range(6)])
    batch = dataclasses.replace(batch, contexts=[text] * 6)
    model = build_model(base, [draw_prefix(base, "decoder", 6)], "decoder")
    model.prompt(0).begin_from(*model.read_start(Contexts([text], 1)))
    start = base.config.decoder_start_token_id
    wanted = []
    for target in batch.targets:
        written = torch.tensor([[start, *text[:-1], start, *target[:-1]]])
        logits = base(input_ids=torch.from_numpy(text)[None], decoder_input_ids=written, use_cache=False).logits[0, 6:]
        wanted.append(nn.functional.cross_entropy(logits, torch.from_numpy(target).long(), reduction="sum"))
    torch.testing.assert_close(model.losses(hold(model, batch)), torch.stack(wanted), rtol=1e-5, atol=0)
    whole = build_model(base, [draw_prefix(base, "both", 6)], "both")
    prompt = whole.prompt(0)
    prompt.begin_from(*whole.read_start(Contexts([text], 1)))
    found = prompt()
    cache = base(
        input_ids=torch.from_numpy(text)[None], decoder_input_ids=torch.tensor([[start, *text[:-1]]]), use_cache=True
    ).past_key_values
    for own, keys, values in (
        (cache.self_attention_cache, found.keys, found.values),
        (cache.cross_attention_cache, found.cross_keys, found.cross_values),
    ):
        for number, layer in enumerate(own.layers):
            torch.testing.assert_close(keys[number], layer.keys[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(values[number], layer.values[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    computed = []
    names = ("k", "k_proj")
    hooks = [
        module.register_forward_hook(lambda _, __, out: computed.append(out[0]))
        for name, module in base.get_encoder().named_modules()
        if name.rpartition(".")[2] in names
    ]
    base.get_encoder()(input_ids=torch.from_numpy(text)[None])
    for hook in hooks:
        hook.remove()
    for number, keys in enumerate(computed):
        torch.testing.assert_close(found.encoder_keys[number].flatten(1), keys, rtol=1e-5, atol=1e-5)
    assert len(computed) == len(found.encoder_keys)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_labels_after_their_inputs_and_answers_are_those_of_plain_passes(bases, kind, placement):
    base = bases[kind]
    model = build_model(base, [draw_prefix(base, placement), draw_prefix(base, placement, seed=1)], placement)
    batch = batch_of(placement)
    with torch.no_grad():
        read = model.read_inputs(hold(model, batch))
        for _ in range(2):
            found = model.losses(dataclasses.replace(read, held=None))
        torch.testing.assert_close(found, plain_losses(base, model, batch), rtol=1e-5, atol=0)
        inputs = draw_inputs(LENGTHS, placement if placement == "decoder" else "encoder")
        expected = [plain_answer(base, model, *parts) for parts in zip(inputs, MOST_TOKENS, strict=True)]
        for budget in (4096, 200, 1):
            assert decode(model, inputs, budget, None) == expected
    assert len({tuple(answer) for answer in expected}) > 1


def plain_answer(base: PreTrainedModel, model: PromptedModel, row: TokenPair, most: int) -> list[int]:
    """One row alone, all of it read anew for each token."""
    read = np.concatenate([np.array(part, np.int64) for part in row])
    answer: list[int] = []
    while len(answer) < most:
        logits = plain_logits(base, model.prompt(0)(), read, np.array([*answer, 0]))
        answer.append(int(logits[-1].argmax()))
    return answer


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_rank_without_rows_computes_along(bases, placement):
    model = build_model(bases["t5"], [draw_prefix(bases["t5"], placement)], placement)
    losses = model.losses(hold(model, idle_batch(1, has_contexts=placement == "decoder")))
    assert losses.tolist() == [0.0]
    losses.sum().backward()
    assert all(not p.grad.any() for p in model.prompts.parameters())


def test_what_a_base_or_a_member_is_not_for_is_refused(bases):
    prompts = [draw_prefix(bases["bart"], "decoder", num) for num in (4, 7)]
    with pytest.raises(UserError, match="^sweep: the decoder of bart .* have 4 and 7 positions"):
        build_model(bases["bart"], prompts, "decoder")
    with pytest.raises(ValueError, match=r"^prompt\.from_layer is for bases with one stack of layers"):
        draw_prefix(bases["t5"], "both", from_layer=1)
