"""Random weights for a base without files: any part of a tensor can be read, with the same numbers on every rank.

A pool of normal numbers is drawn once, and copied once to each device and type that is asked for. A tensor repeats the
pool, starting at a position that depends on its name, so a rank gets its part of a 70B base in the time it takes to
copy it within its device's memory.
"""

import zlib
from math import prod

import torch

CPU = torch.device("cpu")
POOL_SIZE = (1 << 24) - 3  # a prime, so that the rows of a matrix start at different positions


class RandomWeights:
    """Random weights with the interface of `weight_files.WeightFiles`: matrices normal, norms one, biases zero."""

    bytes_read = 0

    def __init__(self, shapes: dict[str, tuple[int, ...]], *, std: float, seed: int):
        self.shapes = shapes
        self._pools: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._std = std
        self._seed = seed

    def read_flat(self, name: str, start: int, out: torch.Tensor) -> None:
        """Elements [start, start + len(out)) of the flattened tensor into 1-D `out`."""
        if len(self.shapes[name]) < 2:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        pool = self._numbers(out.device, out.dtype)
        place = zlib.crc32(name.encode()) + start
        done = 0
        while done < len(out):
            first = (place + done) % POOL_SIZE
            part = pool[first : first + len(out) - done]
            out[done : done + len(part)].copy_(part)
            done += len(part)

    def read_rows(self, name: str, first: int, last: int, device: torch.device = CPU) -> torch.Tensor:
        """Rows [first, last), float32, made on `device`."""
        shape = self.shapes[name]
        width = prod(shape[1:])
        part = torch.empty((last - first) * width, device=device)
        self.read_flat(name, first * width, part)
        return part.view(last - first, *shape[1:])

    def read_columns(self, name: str, first: int, last: int, device: torch.device = CPU) -> torch.Tensor:
        """Columns [first, last) of a matrix, transposed."""
        return self.read_rows(name, 0, self.shapes[name][0], device)[:, first:last].T.contiguous()

    def _numbers(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if (device, dtype) not in self._pools:
            generator = torch.Generator().manual_seed(self._seed)
            numbers = torch.randn(POOL_SIZE, generator=generator) * self._std
            self._pools[device, dtype] = numbers.to(dtype).to(device)
        return self._pools[device, dtype]
