"""Generate answers: the virtual tokens, an input, and what the base says next.

Floor 5. For a causal base rows are padded on the left, so that each row's next token stands at the end: [padding,
virtual tokens, input]. A seq2seq base's encoder reads them padded on the right, as in training. An encoder's answer is
the likeliest label.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ptune_dist.base.layers import max_positions
from ptune_dist.data.batches import pad_rows, plan_micro_batches
from ptune_dist.distributed import gather_from_ranks
from ptune_dist.engine import Engine


def generate_texts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[Sequence[int]], *, max_new_tokens: int,
    micro_batch_tokens: int, sampling: dict[str, Any] | None = None, seed: int = 0,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yield (index, answer) for every input of token ids, batch after batch, on every rank.

    Inputs are shared among the ranks. `sampling` holds transformers' own names (do_sample, temperature, top_p, ...);
    greedy without it. Collective: every rank must exhaust it.
    """
    world, family = engine.world, engine.model.family
    plan = plan_micro_batches(
        range(len(inputs)), np.array([len(ids) for ids in inputs]), world_size=world.size,
        micro_batch_tokens=micro_batch_tokens,
        extra_tokens=engine.num_virtual_tokens + (0 if family == "encoder" else max_new_tokens),
    )  # fmt: skip
    settings = GenerationConfig(
        pad_token_id=pad_id(tokenizer), eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=getattr(engine.model.base.config, "decoder_start_token_id", None),
        use_cache=True, **(sampling or {"do_sample": False}),
    )  # fmt: skip
    for number, groups in enumerate(plan):
        mine = [inputs[i] for i in groups[world.rank]] or [[pad_id(tokenizer)]]  # an idling rank computes along
        if sampling:
            torch.manual_seed(seed + number * world.size + world.rank)
        # The same on every rank: they generate together under ZeRO-3.
        longest = max(len(inputs[i]) for group in groups for i in group)
        settings.max_new_tokens = min(max_new_tokens, room_for_answer(engine, longest))
        if settings.max_new_tokens < 1:  # the input fills a base's last learned position
            yield from ((i, "") for group in groups for i in group)
            continue
        if family == "encoder":
            texts = name_labels(engine, mine, pad_id(tokenizer))
        else:
            texts = tokenizer.batch_decode(generate_ids(engine, mine, settings), skip_special_tokens=True)
        for indices, answers in gather_from_ranks((groups[world.rank], texts[: len(groups[world.rank])]), world):
            yield from zip(indices, answers, strict=True)


def room_for_answer(engine: Engine, longest: int) -> int:
    """The most new tokens after inputs of up to `longest` tokens, where positions are learned."""
    most = max_positions(engine.model.base)
    if most is None or engine.model.family == "encoder":
        return sys.maxsize
    return most - 1 if engine.model.family == "seq2seq" else most - engine.num_virtual_tokens - longest


@torch.no_grad()
def name_labels(engine: Engine, inputs: list[Sequence[int]], pad: int) -> list[str]:
    """The likeliest label of each input."""
    ids, mask = (
        torch.from_numpy(array).to(engine.world.device)
        for array in pad_rows([np.asarray(ids, np.int64) for ids in inputs], pad)
    )
    chosen = engine.model.label_logits(ids, mask.long()).argmax(dim=1).tolist()
    return [engine.model.base.config.id2label[index] for index in chosen]


@torch.no_grad()
def generate_ids(engine: Engine, inputs: list[Sequence[int]], settings: GenerationConfig) -> list:
    """New token ids of each input."""
    base, world = engine.model.base, engine.world
    ids, mask = (
        torch.from_numpy(array).to(world.device)
        for array in pad_rows([np.asarray(ids, np.int64) for ids in inputs], settings.pad_token_id)
    )
    vectors = engine.model.embed(ids)  # [B, P + T, D]
    mask = torch.nn.functional.pad(mask.long(), (vectors.shape[1] - ids.shape[1], 0), value=1)
    if engine.model.family == "causal":
        for row, missing in enumerate((mask == 0).sum(dim=1).tolist()):  # padding to the front
            vectors[row], mask[row] = vectors[row].roll(missing, dims=0), mask[row].roll(missing)
    # Under ZeRO-3 a rank whose rows have ended goes on gathering for those whose rows have not.
    return base.generate(
        inputs_embeds=vectors, attention_mask=mask, generation_config=settings,
        synced_gpus=engine.stage == 3 and world.size > 1,
    )  # fmt: skip


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding; attention never sees it, so any will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
