"""A stored prompt of keys and values as the start of another: which layers it has, and those that are asked for.

Stored are prefix_keys and prefix_values of the layers from `from_layer` on, and lower_keys and lower_values of those
below it where these read something.
"""

from collections.abc import Iterable

from ptune_dist.errors import UserError
from ptune_dist.prompts.layer_tensors import Heads, Layers, join_layers, packed_shape, unpack
from ptune_dist.prompts.peft_prefix import is_adapter, read_adapter
from ptune_dist.prompts.stacks import check_stored
from ptune_dist.prompts.start import Start

PLAIN = ("prefix_keys", "prefix_values")
LOWER = ("lower_keys", "lower_values")


def stored_from_layer(start: Start) -> int:
    """The first layer that was trained of the prompt in `prompt.init_file`. Raises UserError."""
    source = start.read()
    options = source.facts.get("options", {})
    if "from_layer" in options:
        return options["from_layer"]
    return len(source.tensors.get(LOWER[0], ()))


def has_all_layers(start: Start) -> bool:
    """Whether the prompt in `prompt.init_file` has keys and values of the lowest layers too. Raises UserError."""
    return stored_from_layer(start) == 0 or start.holds(*LOWER)


def read_layers(
    start: Start, num_positions: int, heads: tuple[Heads, Heads], first: int, stacks: Iterable[str] | None
) -> tuple[Layers, Layers]:
    """Keys and values of the layers from `first` on; `heads` are those of all layers, `stacks` an encoder-decoder's.

    Raises UserError where the file is of another shape, or has none of these layers.
    """
    source = start.file or ""
    if stacks is not None:
        check_stored(source, stacks)
    if is_adapter(source):
        keys, values = read_adapter(source, num_positions, heads, stacks)
        return keys[first:], values[first:]
    stored = start.read().tensors.get(PLAIN[0])
    if stored is not None and stored.shape[1] != num_positions:
        raise UserError(
            f"prompt.init_file: {start.read().file} has {stored.shape[1]} positions, and this prompt {num_positions}: "
            f"set prompt.num_virtual_tokens={stored.shape[1]}"
        )
    trained_from = stored_from_layer(start)
    begin = 0 if has_all_layers(start) else trained_from
    if begin > first:
        raise UserError(
            f"prompt.init_file: {start.read().file} has keys and values of the layers from {begin} on, and this prompt "
            f"needs those from {first} on: set prompt.from_layer={begin} and prompt.lower_layers=none"
        )
    parts: dict[str, Heads] = dict(zip(PLAIN, (some[trained_from:] for some in heads), strict=True))
    if trained_from > begin:
        parts |= zip(LOWER, (some[:trained_from] for some in heads), strict=True)
    found = start.tensors({name: packed_shape(num_positions, some) for name, some in parts.items()})
    keys, values = (
        [layer for name in (low, high) if name in parts for layer in unpack(found[name], parts[name])]
        for low, high in zip(LOWER, PLAIN, strict=True)
    )
    return join_layers(keys[first - begin :]), join_layers(values[first - begin :])
