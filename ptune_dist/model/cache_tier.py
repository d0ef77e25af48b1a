"""One level of the context cache: tensors within a byte budget, of which the least recently used leave first."""

from collections import OrderedDict

import torch

Tensors = dict[str, torch.Tensor]


class Tier:
    """Contexts by key, on one device."""

    def __init__(self, max_bytes: int, *, is_pinned: bool = False):
        """`is_pinned`: in pinned host memory, which torch allocates in powers of two."""
        self.max_bytes = max_bytes
        self.held: OrderedDict[str, Tensors] = OrderedDict()  # least recently used first
        self.num_bytes = 0
        self._is_pinned = is_pinned

    def get(self, key: str) -> Tensors | None:
        found = self.held.get(key)
        if found is not None:
            self.held.move_to_end(key)
        return found

    def has_room(self, key: str, tensors: Tensors) -> bool:
        """Whether the tensors are held, or can be without driving others out."""
        return key in self.held or self.num_bytes + self._count(tensors) <= self.max_bytes

    def put(self, key: str, tensors: Tensors) -> list[tuple[str, Tensors]]:
        """Hold the tensors; returns what has to leave for them, or the tensors themselves if they exceed the budget.

        A view of a larger storage is copied, so that no more memory is kept alive than is counted.
        """
        if key in self.held:
            self._drop(key)
        num_bytes = self._count(tensors)
        if num_bytes > self.max_bytes:
            return [(key, tensors)]
        leaving: list[tuple[str, Tensors]] = []
        while self.num_bytes + num_bytes > self.max_bytes:
            oldest = next(iter(self.held))
            leaving.append((oldest, self._drop(oldest)))
        self.held[key] = {name: owned(tensor) for name, tensor in tensors.items()}
        self.num_bytes += num_bytes
        return leaving

    def _drop(self, key: str) -> Tensors:
        dropped = self.held.pop(key)
        self.num_bytes -= self._count(dropped)
        return dropped

    def _count(self, tensors: Tensors) -> int:
        sizes = [tensor.nbytes for tensor in tensors.values()]
        if self._is_pinned:
            sizes = [1 << (size - 1).bit_length() if size else 0 for size in sizes]
        return sum(sizes)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph; a copy, if it would keep a larger storage alive."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
