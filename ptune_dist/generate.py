"""Generate answers: the virtual tokens, an input, and what the base says next.

Floor 5. Rows are padded on the left, so that each row's next token stands at the end: [padding, virtual tokens, input].
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ptune_dist.base.layers import max_positions
from ptune_dist.data.batches import plan_micro_batches
from ptune_dist.distributed import World, gather_from_ranks
from ptune_dist.engine import Engine


def generate_texts(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[Sequence[int]], *, max_new_tokens: int,
    micro_batch_tokens: int, sampling: dict[str, Any] | None = None, seed: int = 0,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yield (index, answer) for every input of token ids, batch after batch, on every rank.

    Inputs are shared among the ranks. `sampling` holds transformers' own names (do_sample, temperature, top_p, ...);
    greedy without it. Collective: every rank must exhaust it.
    """
    world = engine.world
    room = max_new_tokens + engine.num_virtual_tokens
    most = max_positions(engine.model.base) or sys.maxsize
    plan = plan_micro_batches(
        range(len(inputs)), np.array([len(ids) for ids in inputs]), world_size=world.size,
        micro_batch_tokens=micro_batch_tokens, extra_tokens=room,
    )  # fmt: skip
    settings = GenerationConfig(
        pad_token_id=pad_id(tokenizer), eos_token_id=tokenizer.eos_token_id,
        use_cache=True, **(sampling or {"do_sample": False}),
    )  # fmt: skip
    for number, groups in enumerate(plan):
        mine = groups[world.rank]
        if sampling:
            torch.manual_seed(seed + number * world.size + world.rank)
        # The same on every rank: they generate together under ZeRO-3.
        longest = max(len(inputs[i]) for group in groups for i in group)
        settings.max_new_tokens = min(max_new_tokens, most - engine.num_virtual_tokens - longest)
        if settings.max_new_tokens < 1:  # the input fills a base's last learned position
            yield from ((i, "") for group in groups for i in group)
            continue
        ids = generate_ids(engine, [inputs[i] for i in mine] or [[settings.pad_token_id]], settings, world)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for indices, answers in gather_from_ranks((mine, texts[: len(mine)]), world):
            yield from zip(indices, answers, strict=True)


@torch.no_grad()
def generate_ids(engine: Engine, inputs: list[Sequence[int]], settings: GenerationConfig, world: World) -> list:
    """New token ids of each input."""
    base = engine.model.base
    width = max(len(ids) for ids in inputs)
    padded = torch.full((len(inputs), width), settings.pad_token_id)
    for row, ids in enumerate(inputs):
        padded[row, width - len(ids) :] = torch.as_tensor(list(ids), dtype=torch.long)
    vectors = engine.model.embed(padded.to(world.device))  # [B, P + T, D]
    num_virtual = vectors.shape[1] - width
    mask = torch.zeros(len(inputs), num_virtual + width, dtype=torch.long, device=world.device)
    for row, ids in enumerate(inputs):
        # Padding goes before the virtual tokens: roll the row's own P + length positions to its right end.
        missing = width - len(ids)
        vectors[row] = torch.cat([vectors[row, num_virtual : num_virtual + missing], vectors[row, :num_virtual],
                                  vectors[row, num_virtual + missing :]])  # fmt: skip
        mask[row, missing:] = 1
    # Under ZeRO-3 a rank whose rows have ended goes on gathering for those whose rows have not.
    return base.generate(
        inputs_embeds=vectors, attention_mask=mask, generation_config=settings,
        synced_gpus=engine.stage == 3 and world.size > 1,
    )  # fmt: skip


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding; attention never sees it, so any will do."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
