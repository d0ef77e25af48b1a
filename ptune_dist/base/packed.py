"""Quantized tensors of public checkpoint formats, dequantized row by row while they are read.

Each class describes one stored weight of logical shape [..., O, I] and gives any of its rows in float32; `files` is a
`weight_files.WeightFiles`. Only the stored rows, or columns, that hold the asked ones are read.
"""

import json
from dataclasses import dataclass, field
from math import prod

import torch

from ptune_dist.base.weight_files import WeightFiles

FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # place in an int32 of each of its eight outputs


def read_matrix(files: WeightFiles, name: str, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) of a tensor seen as a matrix, in the file's dtype."""
    shape = files.shapes[name]
    width = shape[-1] if shape else 1
    out = torch.empty((last - first) * width, dtype=files.dtype_of(name))
    files.read_flat(name, first * width, out)
    return out.view(last - first, width)


def read_whole(files: WeightFiles, name: str) -> torch.Tensor:
    out = torch.empty(prod(files.shapes[name]), dtype=files.dtype_of(name))
    files.read_flat(name, 0, out)
    return out.view(files.shapes[name])


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Two e2m1 numbers in each byte, the lower half first: [N, W] to float32 [N, 2 W]."""
    return FP4_VALUES[torch.stack([packed & 15, packed >> 4], dim=-1).int()].flatten(-2)


def unpack_integers(packed: torch.Tensor, bits: int, *, is_dense: bool = True) -> torch.Tensor:
    """Unsigned integers in int32 words, the lowest bits first: [N, W] to [N, W * 32 / bits].

    Where `bits` does not divide 32, integers cross words; if not `is_dense`, each word has its own and unused bits.
    """
    mask = (1 << bits) - 1
    if 32 % bits == 0 or not is_dense:
        shifts = torch.arange(0, 33 - bits, bits, dtype=torch.int32)
        return ((packed[..., None] >> shifts) & mask).flatten(-2)
    words = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = words.long() & 0xFFFFFFFF
    begins = torch.arange(0, 32 * bits, bits)
    low = words[..., begins // 32] >> begins % 32
    high = words[..., (begins // 32 + 1).clamp(max=bits - 1)] << 32 - begins % 32
    return ((low | high) & mask).int().flatten(-2)


def as_numbers(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents of two (e8m0)."""
    return scales.view(torch.float8_e8m0fnu).float() if scales.dtype == torch.uint8 else scales.float()


@dataclass
class Scaled:
    """Codes times scales of blocks of a matrix: FP8, int8, FP4 and integers packed along a row."""

    shape: tuple[int, ...]
    weight: str
    scales: str
    block: tuple[int, int]  # rows and columns with the same scale
    is_single: bool = False  # one scale for everything, several matrices too
    is_fp4: bool = False
    bits: int = 0  # of packed integers
    is_dense: bool = True  # see `unpack_integers`
    factor: float = 1.0  # of all scales
    zeros: str | None = None
    order: str | None = None  # the group of each column, where they are not in order

    def read(self, files: WeightFiles, first: int, last: int) -> torch.Tensor:
        codes = self._unpack(read_matrix(files, self.weight, first, last))[:, : self.shape[-1]]
        if self.zeros is not None:
            codes = codes - self._columns(files, self._zeros(files, self.zeros, first, last))
        return codes * self._columns(files, self._grid(files, self.scales, first, last) * self.factor)

    def _grid(self, files: WeightFiles, name: str, first: int, last: int) -> torch.Tensor:
        """The row of the grid of blocks for each of the rows [first, last); only these are read."""
        rows = torch.arange(first, last)
        num_rows, width = self.shape[-2:]
        index = rows // num_rows * -(-num_rows // self.block[0]) + rows % num_rows // self.block[0]
        if self.is_single:
            index.zero_()
        num_columns = -(-width // self.block[1])
        begin = int(index[0])
        part = torch.empty((int(index[-1]) + 1 - begin) * num_columns, dtype=files.dtype_of(name))
        files.read_flat(name, begin * num_columns, part)
        return as_numbers(part).view(-1, num_columns)[index - begin]

    def _zeros(self, files: WeightFiles, name: str, first: int, last: int) -> torch.Tensor:
        """Zero points as `_grid` gives scales; those in int32 are packed along the rows of a matrix."""
        if files.dtype_of(name) != torch.int32:
            return self._grid(files, name, first, last)
        found = unpack_integers(read_whole(files, name).T, self.bits, is_dense=self.is_dense).T
        return found[first:last].float() - (1 << self.bits - 1)

    def _columns(self, files: WeightFiles, grid: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            return grid[:, read_whole(files, self.order).long()]
        return grid if grid.shape[1] == 1 else grid.repeat_interleave(self.block[1], 1)[:, : self.shape[-1]]

    def _unpack(self, stored: torch.Tensor) -> torch.Tensor:
        if self.is_fp4:
            return unpack_fp4(stored.view(torch.uint8))
        if self.bits:
            return unpack_integers(stored, self.bits, is_dense=self.is_dense).float() - (1 << self.bits - 1)
        return stored.float()


@dataclass
class Mxfp4Experts:
    """gpt-oss's experts [E, I, O]: blocks [E, O, G, 16] of 32 inputs each and their exponents [E, O, G]."""

    shape: tuple[int, ...]
    blocks: str
    scales: str
    _last: tuple[int, torch.Tensor] | None = field(default=None, repr=False)

    def read(self, files: WeightFiles, first: int, last: int) -> torch.Tensor:
        num_inputs = self.shape[1]
        found = []
        for expert in range(first // num_inputs, -(-last // num_inputs)):
            begin = expert * num_inputs
            found.append(self._expert(files, expert)[max(first, begin) - begin : min(last - begin, num_inputs)])
        return torch.cat(found)

    def _expert(self, files: WeightFiles, expert: int) -> torch.Tensor:
        """One expert [I, O]; the last is kept, because it is read in parts and stored transposed."""
        if self._last is None or self._last[0] != expert:
            exponents = as_numbers(files.read_rows(self.scales, expert, expert + 1)[0])
            codes = unpack_fp4(files.read_rows(self.blocks, expert, expert + 1)[0])
            self._last = (expert, (codes * exponents[..., None]).flatten(1).T)
        return self._last[1]


@dataclass
class NormalFloat4:
    """bitsandbytes' 4 bits: two numbers of a table in a byte, the upper half first, and a scale for each block."""

    shape: tuple[int, ...]
    weight: str
    state: dict
    table: torch.Tensor
    scales: torch.Tensor  # float32, of each block

    def read(self, files: WeightFiles, first: int, last: int) -> torch.Tensor:
        width = self.shape[-1]
        start = first * width // 2
        stop = -(-last * width // 2)
        packed = torch.empty(stop - start, dtype=torch.uint8)
        files.read_flat(self.weight, start, packed)
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()
        codes = codes[first * width - 2 * start :][: (last - first) * width]
        blocks = torch.arange(first * width, last * width) // self.state["blocksize"]
        return (self.table[codes.int()] * self.scales[blocks]).view(last - first, width)


def open_4bit(files: WeightFiles, name: str, state_name: str) -> NormalFloat4:
    """A 4-bit weight of bitsandbytes; its block scales may be quantized too."""
    state = json.loads(bytes(read_whole(files, state_name).tolist()))
    scales = read_whole(files, f"{name}.absmax")
    if f"{name}.nested_absmax" in files.shapes:
        blocks = torch.arange(len(scales)) // state["nested_blocksize"]
        table = read_whole(files, f"{name}.nested_quant_map")
        scales = table[scales.int()] * read_whole(files, f"{name}.nested_absmax")[blocks] + state["nested_offset"]
    table = read_whole(files, f"{name}.quant_map").float()
    return NormalFloat4(tuple(state["shape"]), name, state, table, scales.float())


@dataclass
class Grouped:
    """GPTQ and AWQ: integers stored [I, O] with a scale and a zero point for each group of inputs and output."""

    shape: tuple[int, ...]
    prefix: str
    bits: int
    group_size: int
    is_awq: bool
    has_low_zeros: bool  # GPTQ's first format stores zero points less one

    def read(self, files: WeightFiles, first: int, last: int) -> torch.Tensor:
        begin, end = self._words(first, last)
        start = begin * 32 // self.bits
        outputs = slice(first - start, last - start)
        zeros = self._outputs(self._raise(files.read_columns(f"{self.prefix}qzeros", begin, end)))[outputs]
        scales = files.read_columns(f"{self.prefix}scales", first, last).float()  # [O, G]
        if self.is_awq:
            codes = self._outputs(files.read_columns(f"{self.prefix}qweight", begin, end))[outputs]
        else:
            codes = unpack_integers(files.read_columns(f"{self.prefix}qweight", first, last), self.bits)
        if self.has_low_zeros and 32 % self.bits:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        groups = self._groups(files)
        return ((codes[:, : self.shape[1]] - zeros[:, groups]) * scales[:, groups]).contiguous()

    def _words(self, first: int, last: int) -> tuple[int, int]:
        """The words that hold outputs [first, last): a whole number of cycles, after which integers begin a word."""
        cycle = 1 if 32 % self.bits == 0 else self.bits
        per_cycle = cycle * 32 // self.bits
        return first // per_cycle * cycle, -(-last // per_cycle) * cycle

    def _raise(self, packed: torch.Tensor) -> torch.Tensor:
        """Adds the one that was subtracted, in whole words as GPTQModel does: a zero borrows from its neighbor."""
        if not self.has_low_zeros or 32 % self.bits:
            return packed
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        return packed + torch.tensor(ones, dtype=torch.int32)

    def _outputs(self, packed: torch.Tensor) -> torch.Tensor:
        """int32 [W, N], packed along outputs, to [O, N]."""
        parts = unpack_integers(packed.T, self.bits)  # [N, O]
        if self.is_awq:
            parts = parts.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)
        return parts.T

    def _groups(self, files: WeightFiles) -> torch.Tensor:
        index = f"{self.prefix}g_idx"
        if files.shapes.get(index, (0,)) != (0,):
            return read_whole(files, index).long()
        return torch.arange(self.shape[1]) // self.group_size
