"""Contexts to put into a cache and to look up again."""

from pathlib import Path

import numpy as np
import torch

from ptune_dist.model.context_cache import ContextCache

ITEM_BYTES = 800  # of `tensors_of`


def tokens_of(number: int) -> np.ndarray:
    return np.arange(number, number + 5)


def tensors_of(number: int, dtype=torch.float32, num_bytes: int = ITEM_BYTES) -> dict[str, torch.Tensor]:
    """Random bits, the same for the same number; as floats they include NaNs and subnormal numbers."""
    bits = torch.Generator().manual_seed(number)
    return {
        name: torch.randint(0, 256, (2, num_bytes // 4), dtype=torch.uint8, generator=bits).view(dtype)
        for name in ("layer 0 keys", "layer 0 values")
    }


def same_bits(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> bool:
    if found is None or found.keys() != expected.keys():
        return False
    return all(
        found[k].dtype == t.dtype
        and found[k].shape == t.shape
        and torch.equal(found[k].view(torch.uint8), t.view(torch.uint8))
        for k, t in expected.items()
    )


def build_cache(folder: Path | None = None, *, num_items: int = 0, identity="a base", **options) -> ContextCache:
    """A cache with room for `num_items`; its warnings are in `.warnings`."""
    warnings = []
    cache = ContextCache(
        max_bytes=num_items * ITEM_BYTES, folder=folder, identity=identity, warn=warnings.append, **options
    )
    cache.warnings = warnings
    return cache


def stored_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
