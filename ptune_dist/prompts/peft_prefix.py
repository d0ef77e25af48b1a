"""PEFT's adapters of keys and values: PREFIX_TUNING, and CARTRIDGE, which holds the same in the same layout.

PEFT stores for each position the keys and values of layer after layer, [P, L * 2 * G * Dh]. An MLP is folded in.
Shapes: L layers, P positions, G key/value heads, Dh width of a head.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ptune_dist.errors import UserError
from ptune_dist.prompts.layer_tensors import Heads
from ptune_dist.prompts.method import PeftAdapter
from ptune_dist.prompts.stacks import DECODER
from ptune_dist.prompts.start import find_prompt_file, read_adapter_settings, read_tensors

KEYS_VALUES_ADAPTERS = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's types
STORED = "prompt_embeddings"


def pack_keys_values(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Keys and values [L, P, G, Dh] in PEFT's layout, and the settings of an adapter of prefix tuning."""
    both = torch.stack([keys, values], dim=1)  # [L, 2, P, G, Dh]
    num_layers, _, num_positions, num_heads, head_width = both.shape
    settings = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "encoder_hidden_size": None,
        "token_dim": num_heads * head_width,
        "num_attention_heads": num_heads,
        "num_layers": num_layers,
    }
    return both.permute(2, 0, 1, 3, 4).reshape(num_positions, -1), settings


def as_cartridge(settings: dict[str, Any], num_frozen: int) -> dict[str, Any]:
    """The settings of the same adapter as a cartridge, whose first positions PEFT does not train."""
    shared = {key: value for key, value in settings.items() if key not in ("prefix_projection", "encoder_hidden_size")}
    return shared | {"peft_type": "CARTRIDGE", "num_frozen_tokens": num_frozen}


def for_decoder(adapter: PeftAdapter, settings: dict[str, Any]) -> PeftAdapter:
    """The adapter of a decoder's layers as PEFT reads it for an encoder-decoder.

    PEFT lays its L layers twice one after another, so that a layer of the decoder has two in turn, and gives it the
    first of them only: layer l has number 2 * l mod L. So the layers in between are zeros here.
    """
    assert adapter.prompt_embeddings is not None
    num_layers = settings["num_layers"]
    by_layer = adapter.prompt_embeddings.unflatten(1, (num_layers, -1))
    spread = by_layer.new_zeros(len(by_layer), 2 * num_layers - 1, by_layer.shape[2])
    spread[:, ::2] = by_layer
    more = {"num_layers": 2 * num_layers - 1, "num_transformer_submodules": 2}
    return PeftAdapter(spread.flatten(1), settings | more, adapter.more)


def is_adapter(source: str) -> bool:
    """Whether a file to start from is one of PEFT's."""
    return "peft_type" in read_adapter_settings(find_prompt_file(source).parent)


def read_adapter(
    source: str, num_positions: int, heads: Sequence[Heads], stacks: Iterable[str] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, P, G, Dh] in float32, whose `heads` are these; `stacks` are those of an encoder-decoder.

    Raises UserError.
    """
    file = find_prompt_file(source)
    settings = read_adapter_settings(file.parent)
    kind = settings["peft_type"]
    if kind not in KEYS_VALUES_ADAPTERS:
        raise UserError(f"prompt.init_file: {file} is a PEFT adapter of type {kind}, which holds no keys and values")
    stored = read_tensors(file).get(STORED)
    if stored is None:
        raise UserError(f"prompt.init_file: {file} holds no {STORED}")
    if (settings.get("num_transformer_submodules") == 2) != (stacks is not None):
        kind = "decoder-only or encoder" if stacks is not None else "encoder-decoder"
        raise UserError(f"prompt.init_file: {file} is for {kind} bases")
    if stacks is not None and list(stacks) != [DECODER]:
        raise UserError(f"prompt.init_file: {file} is for the decoder alone: set prompt.placement=decoder")
    if len({*heads[0], *heads[1]}) > 1:
        raise UserError(f"prompt.init_file: {file} is of PEFT, which has no keys and values of unequal width")
    num_layers = len(heads[0])
    if stacks is not None:  # as many as PEFT was told of, which may be more than the decoder has
        num_layers = max(num_layers, settings.get("num_layers") or num_layers)
    num_heads, head_width = heads[0][0]
    wanted = (num_positions, num_layers * 2 * num_heads * head_width)
    named = {"num_layers": num_layers, "num_attention_heads": num_heads, "token_dim": num_heads * head_width}
    differing = [f"{key} {settings[key]}" for key, own in named.items() if settings.get(key) not in (None, own)]
    if tuple(stored.shape) != wanted or differing:
        of_file = ", ".join([*differing, f"{STORED} {tuple(stored.shape)}"])
        raise UserError(
            f"prompt.init_file: {file} is of another shape ({of_file}): this prompt has {num_positions} positions, "
            f"{num_layers} layers, {num_heads} heads of {head_width}, so {STORED} {wanted}"
        )
    keys, values = stored.float().view(num_positions, num_layers, 2, num_heads, head_width).permute(2, 1, 0, 3, 4)
    if stacks is not None:  # see `for_decoder`
        read = 2 * torch.arange(len(heads[0])) % num_layers
        keys, values = keys[read], values[read]
    return keys.contiguous(), values.contiguous()
