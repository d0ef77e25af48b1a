"""Rotary embeddings whose frequencies depend on the longest position of a pass, so that rows change one another."""

from typing import Any

from transformers import PretrainedConfig


def fixed_positions(shape: PretrainedConfig) -> int | None:
    """The number of positions up to which a base's rotary frequencies are always the same; None: any number."""
    text = shape.get_text_config(decoder=True)
    found: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    limits: list[int] = []
    for part in [found, *(part for part in found.values() if isinstance(part, dict))]:  # some bases: by kind of layer
        kind = part.get("rope_type") or ""
        if kind == "longrope":
            original = part.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
        elif "dynamic" in kind:
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)
