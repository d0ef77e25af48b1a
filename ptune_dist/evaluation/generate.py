"""Generate answers: the virtual tokens, an input, and what the base says next.

Floor 5. For a causal base rows are padded on the left, so that each row's next token stands at the end: [padding,
virtual tokens, input]. A seq2seq base's encoder reads them padded on the right, as in training. An encoder's answer is
the likeliest label.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, PreTrainedTokenizerBase

from ptune_dist.base.layers import max_positions
from ptune_dist.data.batches import pad_rows, plan_micro_batches
from ptune_dist.data.encode import TokenPair
from ptune_dist.distributed.world import gather_from_ranks
from ptune_dist.zero.engine import Engine


def generate_texts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[TokenPair], *, max_new_tokens: int,
    micro_batch_tokens: int, member: int = 0, sampling: dict[str, Any] | None = None, seed: int = 0,
    between_batches: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yield (index, answer) for every input of token ids, batch after batch, on every rank.

    An input is (context, rest), what stands before the virtual tokens and after them. Inputs are shared among the
    ranks. `sampling` holds transformers' own names (do_sample, temperature, top_p, ...); greedy without it. Collective:
    every rank must exhaust it.
    """
    world = engine.world
    is_classifier = not engine.model.has_language_head
    num_virtual = engine.model.prompts[member].num_virtual_tokens
    lengths = [len(context) + len(rest) for context, rest in inputs]
    extra = num_virtual + (0 if is_classifier else max_new_tokens)
    plan = plan_micro_batches(
        [(i, (0,)) for i in range(len(inputs))],
        lambda units: len(units) * (max((lengths[i] for i, _ in units), default=0) + extra),
        world_size=world.size, micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip
    settings = GenerationConfig(
        pad_token_id=pad_id(tokenizer), eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=getattr(engine.model.base.config, "decoder_start_token_id", None),
        use_cache=True, **(sampling or {"do_sample": False}),
    )  # fmt: skip
    for number, shares in enumerate(plan):
        groups = [[i for i, _ in units] for units in shares]
        # an idling rank computes along
        mine = [inputs[i] for i in groups[world.rank]] or [([], [pad_id(tokenizer)])]
        if sampling:
            torch.manual_seed(seed + number * world.size + world.rank)
        # The same on every rank: they generate together under ZeRO-3.
        longest = max(lengths[i] for group in groups for i in group)
        settings.max_new_tokens = min(max_new_tokens, room_for_answer(engine, longest, num_virtual))
        if settings.max_new_tokens < 1:  # the input fills a base's last learned position
            yield from ((i, "") for group in groups for i in group)
            continue
        if is_classifier:
            texts = name_labels(engine, mine)
        else:
            texts = tokenizer.batch_decode(generate_ids(engine, mine, settings, member), skip_special_tokens=True)
        for indices, answers in gather_from_ranks((groups[world.rank], texts[: len(groups[world.rank])]), world):
            yield from zip(indices, answers, strict=True)
        between_batches()


def room_for_answer(engine: Engine, longest: int, num_virtual: int) -> int:
    """The most new tokens after inputs of up to `longest` tokens, where positions are learned."""
    most = max_positions(engine.model.base)
    if most is None or not engine.model.has_language_head:
        return sys.maxsize
    if engine.model.base.config.is_encoder_decoder:
        return most - 1 - (num_virtual if engine.model.placement == "decoder" else 0)
    return most - num_virtual - longest


@torch.no_grad()
def name_labels(engine: Engine, inputs: list[TokenPair]) -> list[str]:
    """The likeliest label of each input."""
    chosen = engine.model.label_logits([np.array(rest) for _, rest in inputs], [0] * len(inputs)).argmax(dim=1).tolist()
    return [engine.model.base.config.id2label[index] for index in chosen]


@torch.no_grad()
def generate_ids(engine: Engine, inputs: list[TokenPair], settings: GenerationConfig, member: int) -> list:
    """New token ids of each input."""
    model = engine.model
    # Under ZeRO-3 a rank whose rows have ended goes on gathering for those whose rows have not.
    options = {"generation_config": settings, "synced_gpus": engine.stage == 3 and engine.world.size > 1}
    if model.placement == "decoder":
        return generate_after_decoder_prompt(model, inputs, member, settings, options)
    texts = [np.array([*context, *rest], np.int64) for context, rest in inputs]
    vectors, mask = model.embed(texts, [member] * len(texts))  # [B, P + T, D]
    if not model.base.config.is_encoder_decoder:
        num_virtual = model.prompts[member].num_virtual_tokens
        for row, (context, _) in enumerate(inputs):
            # The context to the front of the virtual tokens, padding to the front of all.
            end, missing = num_virtual + len(context), int((mask[row] == 0).sum())
            virtual, before, after = vectors[row].tensor_split([num_virtual, end])
            vectors[row] = torch.cat([before, virtual, after]).roll(missing, dims=0)
            mask[row] = mask[row].roll(missing)
    return model.base.generate(inputs_embeds=vectors, attention_mask=mask, **options)


def generate_after_decoder_prompt(model, inputs: list[TokenPair], member: int, settings, options: dict) -> list:
    """A seq2seq base whose decoder reads [virtual tokens, start, answer]: the virtual tokens are read first."""
    padded, present = pad_rows([np.array([*context, *rest]) for context, rest in inputs], settings.pad_token_id)
    vectors = model.prompts[member]().vectors
    device = vectors.device
    ids, mask = torch.from_numpy(padded).to(device), torch.from_numpy(present).to(device).long()
    encoded = model.base.get_encoder()(input_ids=ids, attention_mask=mask)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    vectors = vectors.to(encoded[0].dtype).expand(len(ids), -1, -1)
    model.base(
        encoder_outputs=encoded, attention_mask=mask, decoder_inputs_embeds=vectors, past_key_values=cache,
        use_cache=True,
    )  # fmt: skip
    start = torch.full((len(ids), 1), settings.decoder_start_token_id, device=device)  # what the cache does not hold
    out = model.base.generate(
        encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start, past_key_values=cache, **options
    )
    return out[:, start.shape[1] :]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding; attention never sees it, so any will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
