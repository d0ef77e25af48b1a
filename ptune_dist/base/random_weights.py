"""Random weights for a shape without files: the same numbers whatever part of a tensor is asked for, and by whom.

A pool of normal numbers is drawn once; a tensor is the pool from a place that its name decides, again and again. So any
rank has its part of a 70B base in the time it takes to copy it.
"""

import zlib
from math import prod

import torch

POOL_SIZE = (1 << 24) - 3  # a prime: rows of one matrix start at different places


class RandomWeights:
    """Weights as `weight_files.WeightFiles` gives them: matrices normal, norms one, biases zero."""

    bytes_read = 0

    def __init__(self, shapes: dict[str, tuple[int, ...]], *, std: float, seed: int):
        self.shapes = shapes
        self._pool: torch.Tensor | None = None
        self._std, self._seed = std, seed

    def read_flat(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements [start, start + len(out)) of the flattened tensor into 1-D `out`."""
        if len(self.shapes[name]) < 2:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        pool, done = self._numbers(), 0
        place = zlib.crc32(name.encode()) + start
        while done < len(out):
            first = (place + done) % POOL_SIZE
            part = pool[first : first + len(out) - done]
            out[done : done + len(part)].copy_(part)
            done += len(part)

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last), float32."""
        shape = self.shapes[name]
        width = prod(shape[1:])
        part = torch.empty((last - first) * width)
        self.read_flat(name, first * width, part)
        return part.view(last - first, *shape[1:])

    def read_columns(self, name: str, first: int, last: int) -> torch.Tensor:
        """Columns [first, last) of a matrix, transposed."""
        return self.read_rows(name, 0, self.shapes[name][0])[:, first:last].T.contiguous()

    def _numbers(self) -> torch.Tensor:
        if self._pool is None:
            self._pool = torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(self._seed)) * self._std
        return self._pool
