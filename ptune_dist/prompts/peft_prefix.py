"""PEFT's adapters of keys and values: PREFIX_TUNING, and CARTRIDGE, which holds the same in the same layout.

PEFT stores for each position the keys and values of layer after layer, [P, L * 2 * G * Dh]. An MLP is folded in.
Shapes: L layers, P positions, G key/value heads, Dh width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ptune_dist.errors import UserError
from ptune_dist.prompts.layer_tensors import Heads
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


def is_adapter(source: str) -> bool:
    """Whether a file to start from is one of PEFT's."""
    return "peft_type" in read_adapter_settings(find_prompt_file(source).parent)


def read_adapter(source: str, num_positions: int, heads: Sequence[Heads]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, P, G, Dh] in float32, whose `heads` are these. Raises UserError."""
    file = find_prompt_file(source)
    settings = read_adapter_settings(file.parent)
    kind = settings["peft_type"]
    if kind not in KEYS_VALUES_ADAPTERS:
        raise UserError(f"prompt.init_file: {file} is a PEFT adapter of type {kind}, which holds no keys and values")
    stored = read_tensors(file).get(STORED)
    if stored is None:
        raise UserError(f"prompt.init_file: {file} holds no {STORED}")
    if len({*heads[0], *heads[1]}) > 1:
        raise UserError(f"prompt.init_file: {file} is of PEFT, which has no keys and values of unequal width")
    num_layers = len(heads[0])
    num_heads, head_width = heads[0][0]
    wanted = (num_positions, num_layers * 2 * num_heads * head_width)
    if settings.get("num_transformer_submodules") == 2:
        raise UserError(f"prompt.init_file: {file} is for encoder-decoder bases")
    named = {"num_layers": num_layers, "num_attention_heads": num_heads, "token_dim": num_heads * head_width}
    differing = [f"{key} {settings[key]}" for key, own in named.items() if settings.get(key) not in (None, own)]
    if tuple(stored.shape) != wanted or differing:
        of_file = ", ".join([*differing, f"{STORED} {tuple(stored.shape)}"])
        raise UserError(
            f"prompt.init_file: {file} is of another shape ({of_file}): this prompt has {num_positions} positions, "
            f"{num_layers} layers, {num_heads} heads of {head_width}, so {STORED} {wanted}"
        )
    keys, values = stored.float().view(num_positions, num_layers, 2, num_heads, head_width).permute(2, 1, 0, 3, 4)
    return keys.contiguous(), values.contiguous()
