"""Which stacks of an encoder-decoder's layers have prefix keys and values: its placement says.

`encoder`: the encoder's self-attention. `decoder`: the decoder's self-attention, as in PEFT. `both`, for which `prefix`
is another name: these and the decoder's attention to the encoder's output, as in the paper (Li & Liang 2021).
Shapes: L layers of all stacks, P positions, G key/value heads, Dh width of a head.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, Stack
from ptune_dist.prompts.start import find_prompt_file, read_facts

ENCODER = "encoder"
DECODER = "decoder"
CROSS = "cross"
ALL = (ENCODER, DECODER, CROSS)
STACKS = {"encoder": (ENCODER,), "decoder": (DECODER,), "both": ALL, "prefix": ALL}  # by placement
FIELDS = {ENCODER: "encoder_", DECODER: "", CROSS: "cross_"}  # what a contribution's keys and values begin with


def stacks_of(base: BaseFacts, placement: str) -> dict[str, Stack] | None:
    """The stacks that a placement has, in the order of `ALL`; None of a base that is no encoder-decoder.

    Raises ValueError that begins with the key.
    """
    if base.encoder is None:
        return None
    assert base.num_layers is not None and base.num_key_value_heads is not None and base.head_width is not None
    own = Stack(base.num_layers, base.num_key_value_heads, base.head_width)
    names = STACKS[placement]
    if len(names) > 1 and width_of(base.encoder) != width_of(own):
        raise ValueError(
            f"prompt.placement: {placement} needs keys of one width in the encoder and the decoder, and these have "
            f"{width_of(base.encoder)} and {width_of(own)} numbers: use encoder or decoder"
        )
    every = {ENCODER: base.encoder, DECODER: own, CROSS: own}
    return {name: every[name] for name in names}


def check_stored(source: str, stacks: Iterable[str]) -> None:
    """Raise UserError for a stored prompt of other stacks, whose layers may be as many as those of these."""
    placement = read_facts(find_prompt_file(source)).get("placement")
    if placement in STACKS and STACKS[placement] != tuple(stacks):
        raise UserError(f"prompt.init_file: {source} is of placement {placement}: set prompt.placement={placement}")


def width_of(stack: Stack) -> int:
    """The numbers of a position's keys in one layer."""
    return stack.num_heads * stack.head_width


def join_stacks(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys or values of each stack in order as one list of layers, all with the heads of the first stack."""
    heads = parts[0].shape[2:]
    return torch.cat([part.flatten(2).unflatten(2, heads) for part in parts])


def split_stacks(keys: torch.Tensor, values: torch.Tensor, stacks: Mapping[str, Stack]) -> dict[str, torch.Tensor]:
    """Keys and values [L, P, G, Dh] by the field of a contribution, each with the heads of its stack."""
    found = {}
    for name, whole in (("keys", keys), ("values", values)):
        parts = whole.split([stack.num_layers for stack in stacks.values()])
        for (kind, stack), part in zip(stacks.items(), parts, strict=True):
            found[FIELDS[kind] + name] = part.flatten(2).unflatten(2, (stack.num_heads, stack.head_width))
    return found
