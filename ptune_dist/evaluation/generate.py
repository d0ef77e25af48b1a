"""Generate answers: the virtual tokens, an input, and what the base continues with.

An answer depends on its own input alone: not on the rows that share its batch, on the number of ranks or on the size of
a batch (`sampling` says how for sampled tokens).

Rows come and go where the base computes attention over segments (`decoding`); other bases answer whole batches
(`answer_plan`) as their family does (`PromptedModel.generate`). A base with a classification head answers the likeliest
label, and a prompt for regression a number.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from ptune_dist.common.progress_line import ProgressLine
from ptune_dist.data.batches import Batch
from ptune_dist.data.encode import TokenPair
from ptune_dist.distributed.world import gather_from_ranks
from ptune_dist.errors import UserError
from ptune_dist.evaluation.answer_plan import (
    SCALED_BY_LENGTH,
    AnswerBatch,
    Decoding,
    plan_answers,
    room_for_answer,
    rope_types,
)
from ptune_dist.evaluation.decoding import AnswerLoop, Base, answer_rows
from ptune_dist.evaluation.sampling import Chooser, build_sampler
from ptune_dist.model.decode import Decoder
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.zero.engine import Engine


def generate_texts(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[TokenPair],
    decoding: Decoding,
    *,
    member: int = 0,
    task: int = 0,
    numbers: Sequence[int] | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, str]]:
    """Yield (number, answer) for every input of token ids, batch after batch, on every rank.

    Answers have no whitespace at either end: what a target begins with depends on the template, not on the task.

    All inputs are of one task. An input is (context, rest), what stands before the virtual tokens and after them.
    Inputs are shared among the ranks. `numbers` are their places among all that the caller answers, from 0 on where
    left out: sampled tokens depend on them. Collective: every rank must exhaust it.
    """
    numbers = range(len(inputs)) if numbers is None else numbers
    number = engine.model.number_of(member, task)
    decoder = open_decoder(engine.model, number)
    if decoder is None:
        found = answer_in_batches(engine, tokenizer, inputs, decoding, (member, task), numbers=numbers)
    else:
        most_tokens = [room_for(engine.model, row, number, decoding.max_new_tokens) for row in inputs]
        found = decode_rows(engine, tokenizer, inputs, decoding, decoder, most_tokens=most_tokens, numbers=numbers)
    line = ProgressLine("generating answers", len(inputs), is_shown=engine.world.is_main)
    for answers in found:
        yield from ((number, text.strip()) for number, text in answers)
        line.count(len(answers))
        between_batches()


def generate_of_tasks(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[TokenPair],
    decoding: Decoding,
    tasks: np.ndarray | None,
    *,
    member: int = 0,
    first: int = 0,
    between_batches: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, str]]:
    """As `generate_texts`, task after task, of inputs whose tasks [N] these are; None: of one prompt. Collective.

    Numbers count from `first`.
    """
    if tasks is None or engine.model.prompt(member).num_tasks == 1:
        tasks = np.zeros(len(inputs), np.int32)
    for task in np.unique(tasks).tolist():
        rows = np.flatnonzero(tasks == task).tolist()
        yield from generate_texts(
            engine,
            tokenizer,
            [inputs[row] for row in rows],
            decoding,
            member=member,
            task=task,
            numbers=[first + row for row in rows],
            between_batches=between_batches,
        )


def open_decoder(model: PromptedModel, number: int) -> Decoder | None:
    """What answers rows that come and go; None where batches are answered by transformers' own `generate`.

    Rotations that are scaled to the longest row would depend on the others of a pass. Raises UserError.
    """
    scaled = rope_types(model.base) & set(SCALED_BY_LENGTH)
    if scaled and model.start_layers[number]:
        raise UserError(
            f"prompt.method: a prompt that enters at a later layer writes no answers over a base with {min(scaled)} "
            "rotary positions, which depend on the longest row of a pass"
        )
    return None if scaled else model.open_decoder(number)


def decode_rows(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[TokenPair],
    decoding: Decoding,
    decoder: Decoder,
    *,
    most_tokens: Sequence[int],
    numbers: Sequence[int],
    readers: Sequence[int] | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Yield answers as rows are finished; `most_tokens`, `numbers`, `readers`: as in `answer_rows`. Collective."""
    model = engine.model
    is_sharded = engine.stage == 3 and engine.world.size > 1
    hold = engine.contexts.hold if decoder.takes_contexts else take_as_is
    base = Base(engine.without_gradient, hold, engine.world, is_sharded, pad_id(tokenizer))
    chooser = Chooser(decoding.sampling, decoding.seed, model.device)
    listener = decoding.listener
    loop = AnswerLoop(
        decoder,
        base,
        chooser,
        end=cast(int | None, tokenizer.eos_token_id),
        budget=decoding.micro_batch_tokens,
        listener=listener and (lambda row, ids: listener(row, str(tokenizer.decode(ids, skip_special_tokens=True)))),
    )
    for found in answer_rows(loop, inputs, most_tokens, numbers, engine.world, readers):
        ids = [tokens for _, tokens in found]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True) if found else []  # it makes a text of no rows
        yield list(zip([number for number, _ in found], texts, strict=True))


def room_for(model: PromptedModel, row: TokenPair, number: int, max_new_tokens: int) -> int:
    """The most tokens of a row's answer, which is read with the contribution of this number."""
    context, rest = row
    return min(max_new_tokens, room_for_answer(model, len(context) + len(rest), model.num_virtual(number)))


def generate_with_bank(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[TokenPair],
    members: Sequence[int],
    decodings: Sequence[Decoding],
) -> list[str] | None:
    """Greedy answers of inputs, each with its own member and by its own plan, in passes that all of them share.

    None where this base, or one of the prompts, has no such passes. Collective.
    """
    model = engine.model
    decoder = None if rope_types(model.base) & set(SCALED_BY_LENGTH) else model.open_bank_decoder()
    if decoder is None:
        return None
    readers = [model.number_of(member) for member in members]
    own = zip(inputs, readers, decodings, strict=True)
    most_tokens = [room_for(model, row, number, decoding.max_new_tokens) for row, number, decoding in own]
    answers: dict[int, str] = {}
    line = ProgressLine("generating answers", len(inputs), is_shown=engine.world.is_main)
    for found in decode_rows(
        engine,
        tokenizer,
        inputs,
        decodings[0],
        decoder,
        most_tokens=most_tokens,
        numbers=range(len(inputs)),
        readers=readers,
    ):
        answers |= found
        line.count(len(found))
    return [answers[number].strip() for number in range(len(inputs))]


def take_as_is(batch: Batch) -> Batch:
    return batch


def answer_in_batches(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[TokenPair],
    decoding: Decoding,
    reader: tuple[int, int],
    *,
    numbers: Sequence[int],
) -> Iterator[list[tuple[int, str]]]:
    """Yield answers batch after batch; `reader`: the member and the task of all rows. Collective."""
    world = engine.world
    for batch in plan_answers(engine.model, inputs, decoding, engine.model.number_of(*reader), world.size):
        rows = batch.shares[world.rank]
        if batch.max_new_tokens < 1:  # the input fills a base's last learned position
            texts = [""] * len(rows)
        else:
            chosen = [inputs[i] for i in rows] or [([], [pad_id(tokenizer)])]  # a rank without rows computes along
            own = [numbers[i] for i in rows] or [0]
            texts = answer_batch(engine, tokenizer, chosen, batch, decoding, reader, numbers=own)
        answers = gather_from_ranks((rows, texts[: len(rows)]), world)
        yield [(numbers[i], text) for rows, texts in answers for i, text in zip(rows, texts, strict=True)]


def answer_batch(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    inputs: list[TokenPair],
    batch: AnswerBatch,
    decoding: Decoding,
    reader: tuple[int, int],
    *,
    numbers: list[int],
) -> list[str]:
    """This rank's answers of a batch; `numbers` are the rows' own, for sampling. Collective."""
    model = engine.model
    if model.predicts_numbers:
        return predict_numbers(engine, inputs, reader, pad_id(tokenizer))
    number = model.number_of(*reader)
    if not model.writes_text:
        texts = [np.array(rest) for _, rest in inputs]
        return engine.without_gradient(lambda: model.name_labels(texts, number))
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
        lambda: generate_ids(model, inputs, settings, number=number, sampler=sampler, is_synced=is_synced)
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def predict_numbers(engine: Engine, inputs: list[TokenPair], reader: tuple[int, int], pad_id: int) -> list[str]:
    """The predicted number of each input, in the unit of the data; `reader`: member and task. Collective."""
    member, task = reader
    batch = Batch(
        contexts=[np.array(context, np.int64) for context, _ in inputs],
        rests=[np.array(rest, np.int64) for _, rest in inputs],
        targets=[np.zeros(1, np.int64) for _ in inputs],  # a placeholder: where the number is predicted
        readers=[(row, member) for row in range(len(inputs))],
        pad_id=pad_id,
        tasks=[task] * len(inputs),
    )
    return [f"{number:.9g}" for number in engine.row_values(batch)]


@torch.no_grad()
def generate_ids(
    model: PromptedModel,
    inputs: list[TokenPair],
    settings: GenerationConfig,
    *,
    number: int = 0,
    sampler: LogitsProcessorList | None = None,
    is_synced: bool = False,
) -> torch.Tensor:
    """New token ids of each input [B, T]: greedy, or the likeliest after `sampler`. Collective where it `is_synced`."""
    options = {"generation_config": settings, "logits_processor": sampler, "synced_gpus": is_synced}
    return model.generate(inputs, number, options)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding; attention never sees it, so any will do."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return cast(int, found)  # transformers' type is that of any attribute of a tokenizer
