"""Generate answers: the virtual tokens, an input, and what the base continues with.

An answer depends on its own input alone: not on the rows that share its batch, on the number of ranks or on the size of
a batch (`answer_plan` says how, and `sampling` for sampled tokens).

How a base reads the inputs is its family's own (`PromptedModel.generate`). A base with a classification head answers
the likeliest label, and a prompt for regression a number.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from ptune_dist.data.batches import Batch
from ptune_dist.data.encode import TokenPair
from ptune_dist.distributed.world import gather_from_ranks
from ptune_dist.evaluation.answer_plan import AnswerBatch, Decoding, plan_answers
from ptune_dist.evaluation.sampling import build_sampler
from ptune_dist.model.prompted_model import PromptedModel
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
    if not model.writes_text:
        texts = [np.array(rest) for _, rest in inputs]
        return engine.without_gradient(lambda: model.name_labels(texts))
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
    ids = engine.without_gradient(
        lambda: generate_ids(model, inputs, settings, member=member, sampler=sampler, is_synced=is_synced)
    )
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
    return [f"{number:.9g}" for number in engine.row_values(batch)]


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
    return model.generate(inputs, member, options)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding; attention never sees it, so any will do."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return cast(int, found)  # transformers' type is that of any attribute of a tokenizer
