"""Generate answers: the virtual tokens, an input, and what the base continues with.

An answer depends on its own input alone: not on the rows that share its batch, on the number of ranks or on the size of
a batch (`answer_plan` says how, and `sampling` for sampled tokens).

For a causal base rows are padded on the left, so that each row's next token stands at the end: [padding, context,
virtual tokens, rest]. A seq2seq base's encoder reads them padded on the right, as in training. A base with a
classification head answers the likeliest label, and a prompt for regression a number.

Shapes: B rows, P positions of the prompt, T tokens, D width, V vocabulary, L layers, G key/value heads, Dh head width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ptune_dist.data.batches import Batch, pad_rows
from ptune_dist.data.encode import TokenPair
from ptune_dist.distributed.world import gather_from_ranks
from ptune_dist.evaluation.answer_plan import AnswerBatch, Decoding, plan_answers
from ptune_dist.evaluation.sampling import build_sampler
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.prompted_model import PromptedModel, keys_values_of
from ptune_dist.zero.engine import Engine


def generate_texts(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[TokenPair],
    decoding: Decoding,
    *,
    member: int = 0,
    first: int = 0,
    between_batches: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, str]]:
    """Yield (index, answer) for every input of token ids, batch after batch, on every rank.

    An input is (context, rest), what stands before the virtual tokens and after them. Inputs are shared among the
    ranks. Indices count from `first`, the place of these inputs among all that the caller answers: sampled tokens
    depend on it. Collective: every rank must exhaust it.
    """
    world = engine.world
    for batch in plan_answers(engine.model, inputs, decoding, member, world.size):
        rows = batch.shares[world.rank]
        if batch.max_new_tokens < 1:  # the input fills a base's last learned position
            texts = [""] * len(rows)
        else:
            chosen = [inputs[i] for i in rows] or [([], [pad_id(tokenizer)])]  # a rank without rows computes along
            numbers = [first + i for i in rows] or [0]
            texts = answer_batch(engine, tokenizer, chosen, batch, decoding, member=member, numbers=numbers)
        for indices, answers in gather_from_ranks((rows, texts[: len(rows)]), world):
            yield from ((first + i, answer) for i, answer in zip(indices, answers, strict=True))
        between_batches()


def answer_batch(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: list[TokenPair],
    batch: AnswerBatch,
    decoding: Decoding,
    *,
    member: int,
    numbers: list[int],
) -> list[str]:
    """This rank's answers of a batch; `numbers` are the rows' own, for sampling. Collective."""
    model = engine.model
    if model.predicts_numbers:
        return predict_numbers(engine, inputs, member, pad_id(tokenizer), max(map(len, batch.shares)))
    if not model.has_language_head:
        return name_labels(model, inputs)
    settings = GenerationConfig(
        pad_token_id=pad_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=getattr(model.base.config, "decoder_start_token_id", None),
        max_new_tokens=batch.max_new_tokens,
        do_sample=False,
        use_cache=True,
    )
    sampler = build_sampler(decoding.sampling, decoding.seed, numbers, model.device)
    # Under ZeRO-3 a rank whose rows are finished continues to gather for those whose rows are not.
    is_synced = engine.stage == 3 and engine.world.size > 1
    ids = generate_ids(model, inputs, settings, member=member, sampler=sampler, is_synced=is_synced)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def predict_numbers(engine: Engine, inputs: list[TokenPair], member: int, pad_id: int, most_targets: int) -> list[str]:
    """The predicted number of each input, in the unit of the data. Collective."""
    batch = Batch(
        contexts=[np.array(context, np.int64) for context, _ in inputs],
        rests=[np.array(rest, np.int64) for _, rest in inputs],
        targets=[np.zeros(1, np.int64) for _ in inputs],  # a placeholder: where the number is predicted
        readers=[(row, member) for row in range(len(inputs))],
        pad_id=pad_id,
        most_targets=most_targets,
    )
    return [f"{number:g}" for number in engine.row_values(batch)]


@torch.no_grad()
def name_labels(model: PromptedModel, inputs: list[TokenPair]) -> list[str]:
    """The likeliest label of each input."""
    logits = model.label_logits([np.array(rest) for _, rest in inputs], [0] * len(inputs))
    return [model.base.config.id2label[index] for index in logits.argmax(dim=1).tolist()]


@torch.no_grad()
def generate_ids(
    model: PromptedModel,
    inputs: list[TokenPair],
    settings: GenerationConfig,
    *,
    member: int = 0,
    sampler: LogitsProcessorList | None = None,
    is_synced: bool = False,
) -> torch.Tensor:
    """New token ids of each input [B, T]: greedy, or the likeliest after `sampler`. Collective where it `is_synced`."""
    options = {"generation_config": settings, "logits_processor": sampler, "synced_gpus": is_synced}
    if model.base.config.is_encoder_decoder:
        if model.placement == "decoder":
            return generate_after_decoder_prompt(model, inputs, member, options)
        vectors, mask = model.embed([np.array([*context, *rest]) for context, rest in inputs], [member] * len(inputs))
        return model.base.generate(inputs_embeds=vectors, attention_mask=mask, **options)[:, 1:]  # without the start
    return generate_after_prompt(model, inputs, member, options)


def generate_after_prompt(
    model: PromptedModel, inputs: list[TokenPair], member: int, options: dict[str, Any]
) -> torch.Tensor:
    """A causal base: [padding, context, virtual tokens, rest], after the prompt's keys and values if it has some."""
    contributions = model.contributions()
    texts = [np.array([*context, *rest], np.int64) for context, rest in inputs]
    embedded, mask = model.embed(texts, [member] * len(texts), contributions)
    num_virtual = contributions[member].num_vectors
    rows = []
    for row, length, (context, _) in zip(embedded, mask.sum(dim=1).tolist(), inputs, strict=True):
        virtual, before, after = row[:length].tensor_split([num_virtual, num_virtual + len(context)])
        rows.append(torch.cat([before, virtual, after]))
    vectors = pad_sequence(rows, batch_first=True, padding_side="left")
    return generate_after_keys_values(model.base, vectors, mask.flip(1), keys_values_of(contributions[member]), options)


def generate_after_keys_values(
    base: PreTrainedModel,
    vectors: torch.Tensor,
    mask: torch.Tensor,
    keys_values: KeysValues | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """A causal base's tokens after vectors [B, T, D], padded on the left, before which every row reads keys/values.

    They are [L, P, G, Dh] and take P positions, as in PEFT. transformers wants the vectors and the mask of the whole
    text: it leaves out the first vectors, as many as there are positions in the cache.
    """
    if keys_values is None:
        return base.generate(inputs_embeds=vectors, attention_mask=mask, **options)
    num_rows, num_before = len(vectors), keys_values.length
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    for layer, parts in enumerate(zip(keys_values.keys, keys_values.values, strict=True)):
        keys, values = (part.to(vectors.dtype).transpose(0, 1).expand(num_rows, -1, -1, -1) for part in parts)
        cache.update(keys, values, layer)
    unread = vectors.new_zeros(num_rows, num_before, vectors.shape[2])
    return base.generate(
        inputs_embeds=torch.cat([unread, vectors], dim=1),
        attention_mask=torch.cat([mask.new_ones(num_rows, num_before), mask], dim=1),
        past_key_values=cache,
        **options,
    )


def generate_after_decoder_prompt(
    model: PromptedModel, inputs: list[TokenPair], member: int, options: dict[str, Any]
) -> torch.Tensor:
    """A seq2seq base whose decoder reads [virtual tokens, start, answer]: the virtual tokens are read first."""
    settings = options["generation_config"]
    padded, present = pad_rows([np.array([*context, *rest]) for context, rest in inputs], settings.pad_token_id)
    mask = model.to_tensor(present)
    encoded = model.base.get_encoder()(input_ids=model.to_tensor(padded), attention_mask=mask)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    vectors = model.prompts[member]().vectors.to(encoded[0].dtype)
    model.base(
        encoder_outputs=encoded,
        attention_mask=mask,
        decoder_inputs_embeds=vectors.expand(len(inputs), -1, -1),
        past_key_values=cache,
        use_cache=True,
    )
    start = torch.full((len(inputs), 1), settings.decoder_start_token_id, device=mask.device)  # not in the cache yet
    out = model.base.generate(
        encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start, past_key_values=cache, **options
    )
    return out[:, start.shape[1] :]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding; attention never sees it, so any will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
