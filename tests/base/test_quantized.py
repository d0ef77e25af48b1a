"""A quantized weight can be cut anywhere: a rank reads and quantizes its own part, and gets the cut of the whole."""

import math

import pytest
import torch

from ptune_dist.base import fp8, int8
from ptune_dist.base import quantized as storage
from ptune_dist.base.quantized import QuantizedRows
from tests.base.test_int8 import random_weight


def parts_of(num_elements: int, world_size: int) -> list[tuple[int, int]]:
    """[start, stop) of every rank, as ZeRO-3 partitions: parts of equal size; the last may be short or empty."""
    size = math.ceil(num_elements / world_size)
    return [(min(r * size, num_elements), min((r + 1) * size, num_elements)) for r in range(world_size)]


class CountedRows:
    """Float rows of a matrix, and how many were read."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.num_read = 0

    def __call__(self, first: int, last: int) -> torch.Tensor:
        assert 0 <= first < last <= len(self.weight)
        self.num_read += last - first
        return self.weight[first:last]


@pytest.mark.parametrize("quantize_rows", [int8.quantize_rows, fp8.quantize_rows])
@pytest.mark.parametrize("chunk_elements", [4 << 20, 20, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 7), (13, 3), (8, 8), (17, 1), (2, 50)])
def test_the_parts_of_all_ranks_are_the_whole(monkeypatch, shape, world_size, chunk_elements, quantize_rows):
    monkeypatch.setattr(storage, "CHUNK_ELEMENTS", chunk_elements)
    weight = random_weight(*shape)
    quantized, scales = quantize_rows(weight)
    for (start, stop), (first, last) in zip(
        parts_of(weight.numel(), world_size), parts_of(len(weight), world_size), strict=True
    ):
        rows = QuantizedRows(CountedRows(weight), quantize_rows, *shape)
        part = torch.empty(stop - start, dtype=torch.int8)
        of_scales = torch.empty(last - first, dtype=torch.int32)
        rows.fill_weight(start, part)
        rows.fill_scales(first, of_scales)
        assert torch.equal(part, quantized.view(-1)[start:stop])
        assert torch.equal(of_scales.view(torch.float32), scales[first:last])


def test_any_part_alone_is_the_cut_of_the_whole():
    weight = random_weight(6, 5)
    quantized, scales = int8.quantize_rows(weight)
    for start in range(30):
        for stop in range(start + 1, 31):
            part = torch.empty(stop - start, dtype=torch.int8)
            QuantizedRows(CountedRows(weight), int8.quantize_rows, 6, 5).fill_weight(start, part)
            assert torch.equal(part, quantized.view(-1)[start:stop])
    for first in range(6):
        for last in range(first + 1, 7):
            part = torch.empty(last - first, dtype=torch.int32)
            QuantizedRows(CountedRows(weight), int8.quantize_rows, 6, 5).fill_scales(
                first, part
            )  # without reading the weight first
            assert torch.equal(part.view(torch.float32), scales[first:last])


@pytest.mark.parametrize("num_rows", [1000, 1008, 997, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_a_rank_reads_its_own_rows_and_few_others(num_rows, world_size):
    weight = random_weight(num_rows, 13)
    # If the rows do not divide evenly, a rank's scales may begin one row per earlier rank away from its weight.
    extra = 2 if num_rows % world_size == 0 else 2 + world_size
    for (start, stop), (first, last) in zip(
        parts_of(weight.numel(), world_size), parts_of(num_rows, world_size), strict=True
    ):
        read = CountedRows(weight)
        rows = QuantizedRows(read, int8.quantize_rows, *weight.shape)
        rows.fill_weight(start, torch.empty(stop - start, dtype=torch.int8))
        rows.fill_scales(first, torch.empty(last - first, dtype=torch.int32))
        assert read.num_read <= num_rows / world_size + extra
