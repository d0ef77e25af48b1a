"""Which stacks of an encoder-decoder's layers have prefix keys and values: its placement says.

`encoder`: the encoder's self-attention. `decoder`: the decoder's self-attention, as in PEFT. `both`, for which `prefix`
is another name: these and the decoder's attention to the encoder's output, as in the paper (Li & Liang 2021).
"""

from collections.abc import Iterable, Mapping

from ptune_dist.errors import UserError
from ptune_dist.prompts.layer_tensors import Heads, Layers, join_layers
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
    if base.num_layers is None or base.num_key_value_heads is None or base.head_width is None:
        raise ValueError("prompt.method: prefix_tuning needs a base whose layers keep keys and values")
    own = Stack(base.num_layers, base.num_key_value_heads, base.head_width)
    every = {ENCODER: base.encoder, DECODER: own, CROSS: own}
    return {name: every[name] for name in STACKS[placement]}


def heads_of_stacks(stacks: Mapping[str, Stack]) -> Heads:
    """Of every layer."""
    return tuple((own.num_heads, own.head_width) for own in stacks.values() for _ in range(own.num_layers))


def split_stacks(keys: Layers, values: Layers, stacks: Mapping[str, Stack]) -> dict[str, Layers]:
    """Keys and values of all stacks' layers by the field of a contribution."""
    found = {}
    for name, whole in (("keys", keys), ("values", values)):
        first = 0
        for kind, stack in stacks.items():
            own = whole[first : first + stack.num_layers]
            found[FIELDS[kind] + name] = own if stack.num_layers == len(whole) else join_layers(list(own))
            first += stack.num_layers
    return found


def check_stored(source: str, stacks: Iterable[str]) -> None:
    """Raise UserError for a stored prompt of other stacks, whose layers may be as many as those of these."""
    placement = read_facts(find_prompt_file(source)).get("placement")
    if placement in STACKS and STACKS[placement] != tuple(stacks):
        raise UserError(f"prompt.init_file: {source} is of placement {placement}: set prompt.placement={placement}")
