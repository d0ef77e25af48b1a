"""The options of prefix tuning, and what they come to with the start that a config asks for."""

from typing import Literal

from pydantic import Field

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import Options
from ptune_dist.prompts.prefix_file import has_all_layers
from ptune_dist.prompts.start import Start

OF_TEXT = ("text", "rows")  # starts whose first position is that of a text, which attention falls back on


class PrefixOptions(Options):
    """What is trained of the keys and values, and how."""

    from_layer: int = Field(default=0, ge=0)
    """The first layer, counted from 0, whose keys and values are trained. The layers below it read a row without
    gradient, and what they leave of it can be kept in the context cache."""

    lower_layers: Literal["start", "none"] | None = None
    """What layers below `from_layer` read before a row: the keys and values of the `start`, which stay as they are, or
    `none`. Left out: `start` where that is a text, rows or a file with keys and values of all layers."""

    num_frozen: int | None = Field(default=None, ge=0)
    """The first positions that stay as they start: models attend to the first token of a text when nothing else fits,
    and moving it harms training. Where left out: 1 with `init: text` and `rows`, as many as the prompt of an
    `init_file` has, else 0."""

    train_keys: bool = True
    """`false` trains the values alone."""

    reparameterization: Literal["none", "mlp"] = "none"
    """`mlp`: a trained embedding of each position and an MLP give what is added to the start, as in the paper. It is
    folded away for serving and export."""

    encoder_hidden_size: int | None = Field(default=None, gt=0)
    """The hidden size of `reparameterization: mlp`; the width of a layer's keys where left out."""

    init_rows: int | None = Field(default=None, gt=0)
    """With `init: rows`: the number of training rows to start from; as many as fill the positions where left out."""


def count_frozen(options: PrefixOptions, num_positions: int, start: Start) -> int:
    """F. Raises ValueError that begins with the key where nothing would be trained."""
    if options.num_frozen is None:
        found = 1 if start.asked in OF_TEXT else 0
        if start.asked == "file":
            found = count_stored(start)
        return min(found, num_positions - 1)
    if options.num_frozen >= num_positions:
        raise ValueError(
            f"prompt.num_frozen: {options.num_frozen} of prompt.num_virtual_tokens={num_positions} leaves nothing to "
            "train"
        )
    return options.num_frozen


def count_stored(start: Start) -> int:
    """The positions that stay of the prompt in `prompt.init_file`. Raises UserError where it is to be read."""
    try:
        source = start.read()
    except UserError:
        if start.kind == "file":
            raise
        return 0  # the prompt is loaded, and what it started from may be gone
    if "frozen_values" in source.tensors:
        return source.tensors["frozen_values"].shape[1]
    return int(source.settings.get("num_frozen_tokens") or 0)


def keeps_lower(options: PrefixOptions, start: Start) -> bool:
    """Whether layers below `from_layer` have the keys and values of the start. Raises UserError."""
    if options.from_layer == 0 or options.lower_layers is not None:
        return options.from_layer > 0 and options.lower_layers == "start"
    if start.kind == "file":
        return has_all_layers(start)
    return start.asked in (*OF_TEXT, "file")


def check_options(options: PrefixOptions, start: Start) -> None:
    """Raise ValueError for options that belong to what was not chosen."""
    if options.lower_layers is not None and options.from_layer == 0:
        raise ValueError("prompt.lower_layers is for layers below prompt.from_layer, which is 0")
    if options.lower_layers == "start" and start.asked in ("random", "zero"):
        raise ValueError(f"prompt.lower_layers: start needs a start from text, rows or a file, not {start.asked}")
    if options.encoder_hidden_size is not None and options.reparameterization != "mlp":
        raise ValueError("prompt.encoder_hidden_size is for the MLP: set prompt.reparameterization=mlp")
    if options.init_rows is not None and start.asked != "rows":
        raise ValueError(f"prompt.init_rows is given but prompt.init is {start.asked}: set prompt.init=rows")
