"""Tensors of a base's layers: one for all of them, or one for each where their heads differ.

Shapes: L layers, P positions, G key/value heads, D width of a head, N numbers of one position in all layers.
"""

from collections.abc import Iterable, Sequence

import torch

# [L, P, G, D]; or [P, G, D] of each layer, without heads where a layer keeps no keys and values. Both are indexed by
# layer and cut to some layers alike.
Layers = torch.Tensor | tuple[torch.Tensor, ...]
Heads = tuple[tuple[int, int], ...]  # of each layer: G and D
Shape = tuple[int, int, int, int]


def join_layers(parts: Sequence[torch.Tensor]) -> Layers:
    """Tensors [P, G, D] of each layer, as one where they are of one shape."""
    return torch.stack(list(parts)) if len({part.shape for part in parts}) == 1 else tuple(parts)


def count_positions(layers: Layers) -> int:
    return layers[0].shape[0]


def cut_positions(layers: Layers, run: slice) -> Layers:
    """A run of positions of every layer."""
    return layers[:, run] if isinstance(layers, torch.Tensor) else tuple(layer[run] for layer in layers)


def cat_positions(parts: Sequence[Layers]) -> Layers:
    """Positions of several parts, one after another."""
    whole = [part for part in parts if isinstance(part, torch.Tensor)]
    if len(whole) == len(parts):
        return torch.cat(whole, dim=1)
    return tuple(torch.cat(some) for some in zip(*parts, strict=True))


def to_dtype(layers: Layers, dtype: torch.dtype) -> Layers:
    return layers.to(dtype) if isinstance(layers, torch.Tensor) else tuple(layer.to(dtype) for layer in layers)


def heads_of(layers: Layers) -> Heads:
    return tuple((part.shape[1], part.shape[2]) for part in layers)


def packed_shape(num_positions: int, heads: Heads) -> Shape:
    """Of one tensor for all layers: [L, P, G, D], or [1, P, 1, N] where layers differ."""
    if len(set(heads)) == 1:
        return len(heads), num_positions, *heads[0]
    return 1, num_positions, 1, sum(num_heads * width for num_heads, width in heads)


def pack(layers: Layers) -> torch.Tensor:
    """One tensor of `packed_shape`."""
    joined = layers if isinstance(layers, torch.Tensor) else join_layers(layers)
    if isinstance(joined, torch.Tensor):
        return joined
    return torch.cat([part.flatten(1) for part in joined], dim=1)[None, :, None]


def unpack(packed: torch.Tensor, heads: Heads) -> Layers:
    """The layers that were packed."""
    if len(set(heads)) == 1:
        return packed
    parts = packed[0, :, 0].split([num_heads * width for num_heads, width in heads], dim=1)
    return tuple(
        part.unflatten(1, own) if part.shape[1] else empty(len(part), part)
        for part, own in zip(parts, heads, strict=True)
    )


def place(parts: Iterable[torch.Tensor], heads: Heads, num_positions: int) -> Layers:
    """Tensors [P, G, D] of the layers that have heads, among the others."""
    given = iter(parts)
    return join_layers([next(given) if num_heads else empty(num_positions) for num_heads, _ in heads])


def empty(num_positions: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """[P, 0, 0] of a layer without heads."""
    shape = (num_positions, 0, 0)
    return torch.zeros(shape) if like is None else like.new_zeros(shape)
