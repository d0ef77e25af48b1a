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


def unpack_integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers in each int32, the lowest bits first: [N, W] to [N, W * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


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
    kind: str = "plain"  # or "fp4", "int4", "int8": packed
    factor: float = 1.0  # of all scales
    zeros: str | None = None

    def read(self, files: WeightFiles, first: int, last: int) -> torch.Tensor:
        codes = self._unpack(read_matrix(files, self.weight, first, last))[:, : self.shape[-1]]
        if self.zeros is not None:
            codes = codes - self._spread(read_whole(files, self.zeros).float(), first, last)
        scales = as_numbers(read_whole(files, self.scales)) if self._is_small(files) else None
        return codes * (self._spread(scales, first, last) if scales is not None else self._part(files, first, last))

    def _is_small(self, files: WeightFiles) -> bool:
        return len(files.shapes[self.scales]) != 2 or self.shape[:-2] != ()

    def _part(self, files: WeightFiles, first: int, last: int) -> torch.Tensor:
        """The scales of rows [first, last) of a matrix, without reading the others."""
        rows = self.block[0]
        begin = first // rows
        stored = as_numbers(read_matrix(files, self.scales, begin, -(-last // rows)))
        return self._columns(stored[torch.arange(first, last) // rows - begin]) * self.factor

    def _spread(self, scales: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The scales of rows [first, last) of a matrix, or of several, one below the other."""
        if scales.numel() == 1:
            return scales.reshape(1, 1) * self.factor
        num_rows = self.shape[-2]
        grid = -(-num_rows // self.block[0])
        number = torch.arange(first, last)
        found = scales.reshape(prod(self.shape[:-2]) * grid, -1)[
            number // num_rows * grid + number % num_rows // self.block[0]
        ]
        return self._columns(found) * self.factor

    def _columns(self, scales: torch.Tensor) -> torch.Tensor:
        return scales if scales.shape[1] == 1 else scales.repeat_interleave(self.block[1], 1)[:, : self.shape[-1]]

    def _unpack(self, stored: torch.Tensor) -> torch.Tensor:
        if self.kind == "fp4":
            return unpack_fp4(stored.view(torch.uint8))
        if self.kind in ("int4", "int8"):
            bits = int(self.kind[3:])
            return unpack_integers(stored, bits).float() - (1 << bits - 1)
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
    is_awq: bool
    zero_offset: int  # added to stored zero points: 1 in GPTQ's first format

    def read(self, files: WeightFiles, first: int, last: int) -> torch.Tensor:
        step = 32 // self.bits  # integers in an int32
        begin = first // step
        end = -(-last // step)
        zeros = self._outputs(files.read_columns(f"{self.prefix}qzeros", begin, end))[first - begin * step :]
        scales = files.read_columns(f"{self.prefix}scales", first, last).float()  # [O, G]
        if self.is_awq:
            codes = self._outputs(files.read_columns(f"{self.prefix}qweight", begin, end))[first - begin * step :]
        else:
            codes = unpack_integers(files.read_columns(f"{self.prefix}qweight", first, last), self.bits)
        codes = codes[: last - first]
        groups = self._groups(files, scales.shape[1])
        zeros = (zeros[: last - first] + self.zero_offset) & ((1 << self.bits) - 1 if self.is_awq else 0x7FFF)
        return (codes - zeros[:, groups]) * scales[:, groups]

    def _outputs(self, packed: torch.Tensor) -> torch.Tensor:
        """int32 [O / step, N], packed along outputs, to [O, N]."""
        parts = unpack_integers(packed[..., None], self.bits)  # [O / step, N, step]
        if self.is_awq:
            parts = parts[..., AWQ_ORDER]
        return parts.transpose(1, 2).flatten(0, 1)

    def _groups(self, files: WeightFiles, num_groups: int) -> torch.Tensor:
        index = f"{self.prefix}g_idx"
        if index in files.shapes:
            return read_whole(files, index).long()
        return torch.arange(self.shape[1]) // -(-self.shape[1] // num_groups)
