"""Keys and values of a prefix as transformers' caches have them.

Shapes: L layers, P positions, G key/value heads, Dh width of a head.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.prompts.export import differ_by_layer, is_of_seq2seq, name_other_export, write_folder
from ptune_dist.prompts.start import VALUE_HEAD

FILES = ("past_key_values.safetensors", "past_key_values.json")


def export_kv(tensors: dict[str, torch.Tensor], facts: dict[str, Any], dtype: torch.dtype, out: Path) -> None:
    """Write `past_key_values.safetensors`: `keys.I` and `values.I` [1, G, P, Dh] of layer I, in the base's dtype.

    They stand before everything that a causal base reads, or before what the decoder of a seq2seq base writes; keys
    are as a cache has them, with the rotation of their positions. Raises UserError.
    """
    check_for_kv(tensors, facts)
    found = {}
    for name in ("keys", "values"):
        lower = tensors.get(f"lower_{name}")
        layers = tensors[f"prefix_{name}"]
        layers = layers if lower is None else torch.cat([lower, layers])
        for number, layer in enumerate(layers.to(dtype)):
            found[f"{name}.{number}"] = layer.transpose(0, 1)[None].contiguous()
    settings = {
        "base": facts["base"]["path"],
        "num_layers": len(found) // 2,
        "num_positions": found["keys.0"].shape[2],
        "of": "decoder" if is_of_seq2seq(facts) else "model",
    }
    files = (save(found, {"format": "pt"}), (json.dumps(settings, indent=2) + "\n").encode())
    write_folder(out, dict(zip(FILES, files, strict=True)))


def check_for_kv(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Raise UserError for a prompt that no cache of transformers can hold."""
    name = facts.get("method", "prompt_tuning")
    family = FAMILIES.get(facts.get("base", {}).get("family", ""))
    if "prefix_keys" not in tensors:
        has_vectors = "virtual_tokens" in tensors and not any(key.startswith(VALUE_HEAD) for key in tensors)
        goes_in_model = has_vectors and facts["placement"] != "decoder"
        other = ": use --to model" if goes_in_model else name_other_export(tensors, facts)
        raise UserError(f"--to kv: this is for keys and values, and {name} trains none{other}")
    if any(key.startswith(VALUE_HEAD) for key in tensors):
        raise UserError("--to kv: this prompt was trained with a head that answers numbers, which no cache holds")
    if family and family.trains_head:
        raise UserError(f"--to kv: an encoder has no cache{name_other_export(tensors, facts)}")
    wanted = "decoder" if is_of_seq2seq(facts) else "prefix"
    if facts["placement"] != wanted:
        raise UserError(
            f"--to kv: a cache precedes all that is read, which is prompt.placement={wanted}, not {facts['placement']}"
        )
    if facts.get("options", {}).get("from_layer") and "lower_keys" not in tensors:
        raise UserError(
            "--to kv: all layers of a cache have the same positions, and this begins with prompt.from_layer"
        )
    if not is_of_seq2seq(facts) and differ_by_layer(tensors, facts):
        raise UserError("--to kv: keys and values of layers that differ are not exported")
