"""Which rows are answered together: what makes an answer independent of the rows that share its batch.

All rows of a batch may have equally many new tokens. So no row's answer is cut short for the sake of another, and no
row that is finished runs out of learned positions while others continue.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ptune_dist.base.layers import max_positions
from ptune_dist.data.batches import Unit, plan_micro_batches
from ptune_dist.data.encode import TokenPair
from ptune_dist.model.prompted_model import PromptedModel

DEFAULT_NEW_TOKENS = 32  # of answers that nothing is known about
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")  # names that shapes have for local attention
SCALED_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that depend on the longest row of a batch
# Architectures of transformers that read padding as any token; RWKV also mixes up the states of the rows of a batch.
ANSWER_ALONE = ("rwkv", "trocr", "xlstm")
# Architectures that count positions with the padding: for their embeddings, or to compress blocks of them.
COUNTS_PADDING = ("deepseek_v4", "git")


@dataclass(frozen=True)
class Decoding:
    """How inputs are answered.

    sampling: transformers' own names (temperature, top_p, top_k); greedy without it. seed: of sampling. listener: gets
    a row's number and its answer so far with each token, on the rank that computes it, where rows come and go.
    """

    max_new_tokens: int
    micro_batch_tokens: int
    sampling: dict[str, Any] | None = None
    seed: int = 0
    listener: Callable[[int, str], None] | None = None


class AnswerBatch(NamedTuple):
    """The rows that each rank answers at a time, and the most new tokens of each of these rows."""

    shares: list[list[int]]
    max_new_tokens: int


def plan_answers(
    model: PromptedModel, inputs: Sequence[TokenPair], decoding: Decoding, number: int, world_size: int
) -> list[AnswerBatch]:
    """Batches of all inputs, the same on every rank; `number`: of the contribution that they are read with."""
    num_virtual = model.num_virtual(number)
    lengths = [len(context) + len(rest) for context, rest in inputs]
    is_padding_seen = sees_padding(model, number)
    # A row beyond the budget is a batch of its own.
    budget = 1 if model.base.config.model_type in ANSWER_ALONE else decoding.micro_batch_tokens
    alike: dict[tuple[int, int], list[int]] = {}  # rows that may share a batch
    for i, length in enumerate(lengths):
        num_new = min(decoding.max_new_tokens, room_for_answer(model, length, num_virtual))
        alike.setdefault((num_new, length if is_padding_seen else 0), []).append(i)
    batches = []
    for (num_new, _), rows in alike.items():
        extra = num_virtual + (num_new if model.writes_text else 0)
        plan = plan_micro_batches(
            [(i, (0,)) for i in rows],
            functools.partial(count_positions, lengths, extra),
            world_size=world_size,
            micro_batch_tokens=budget,
        )
        batches += [AnswerBatch([[i for i, _ in units] for units in shares], num_new) for shares in plan]
    return batches


def count_positions(lengths: list[int], extra: int, units: list[Unit]) -> int:
    """Positions of padded rows, each with `extra` beside its input."""
    return len(units) * (max((lengths[i] for i, _ in units), default=0) + extra)


def room_for_answer(model: PromptedModel, length: int, num_virtual: int) -> int:
    """The most new tokens after an input of `length` tokens, where positions are learned."""
    most = max_positions(model.base)
    if most is None or not model.writes_text:
        return sys.maxsize
    return max(0, most - model.count_before_answer(num_virtual, length))


def sees_padding(model: PromptedModel, number: int) -> bool:
    """Whether padding would change a row's answer, so that only rows of one length may share a batch.

    It changes rotary embeddings that are scaled to the longest row. It also stands between keys and values that are
    read first and the row's text, which matters where distances are counted with padding: local attention, MPT's ALiBi.
    """
    if rope_types(model.base) & set(SCALED_BY_LENGTH):
        return True
    shape = model.base.config.get_text_config(decoder=True)
    if shape.model_type in COUNTS_PADDING:
        return True
    counts_padding = shape.model_type == "mpt" or any(getattr(shape, name, None) for name in WINDOWS)
    return counts_padding and not model.prompt_of(number).stands_in_sequence


def rope_types(base: PreTrainedModel) -> set[str]:
    """The kinds of a base's rotary embeddings; some bases have several, by kind of layer."""
    found = getattr(base.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    return {part["rope_type"] for part in parts if "rope_type" in part}
