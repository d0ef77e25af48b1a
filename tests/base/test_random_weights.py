"""A random base has the same numbers on every rank, whatever part of a tensor is read."""

import math

import pytest
import torch

from ptune_dist.base import random_weights
from ptune_dist.base.random_weights import RandomWeights

SHAPES = {"a.weight": (37, 11), "b.weight": (37, 11), "cube": (3, 4, 5), "norm.weight": (11,), "a.bias": (37,)}


def weights(seed: int = 0, std: float = 0.02, **shapes) -> RandomWeights:
    return RandomWeights(SHAPES | shapes, std=std, seed=seed)


def read(source: RandomWeights, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    out = torch.full(((math.prod(source.shapes[name]) if stop is None else stop) - start,), torch.nan)
    source.read_flat(name, start, out)
    return out


@pytest.mark.parametrize("pool_size", [random_weights.POOL_SIZE, 101, 7])  # also smaller than a tensor
@pytest.mark.parametrize("name", SHAPES)
def test_any_part_is_the_cut_of_the_whole(monkeypatch, name, pool_size):
    monkeypatch.setattr(random_weights, "POOL_SIZE", pool_size)
    source = weights()
    whole = read(source, name)
    for start in range(0, len(whole), 7):
        for stop in range(start, len(whole), 11):
            assert torch.equal(read(source, name, start, stop), whole[start:stop])


def test_rows_and_columns_are_those_of_the_whole():
    source = weights()
    whole = read(source, "a.weight").view(37, 11)
    assert torch.equal(source.read_rows("a.weight", 5, 9), whole[5:9])
    assert torch.equal(source.read_columns("a.weight", 2, 4), whole[:, 2:4].T)
    assert torch.equal(source.read_rows("cube", 1, 3).flatten(), read(source, "cube")[20:])


def test_seed_and_name_matter_and_nothing_else():
    first = read(weights(), "a.weight")
    torch.randn(3)
    assert torch.equal(read(weights(), "a.weight"), first)
    assert torch.equal(read(weights(more=(3, 3)), "a.weight"), first)
    assert not torch.equal(read(weights(seed=1), "a.weight"), first)
    assert not torch.equal(read(weights(), "b.weight"), first)


def test_torchs_generator_is_left_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    read(weights(), "a.weight")
    assert torch.equal(torch.rand(3), wanted)


def test_matrices_are_normal_norms_one_and_biases_zero():
    source = weights(std=0.5, big=(300, 400))
    big = read(source, "big")
    assert abs(big.mean()) < 0.01 and abs(big.std() - 0.5) < 0.01
    assert len(big.unique()) > 0.9 * len(big)
    assert read(source, "norm.weight").tolist() == [1.0] * 11
    assert read(source, "a.bias").tolist() == [0.0] * 37


def test_numbers_are_cast_to_what_they_are_read_into():
    out = torch.empty(11 * 37, dtype=torch.bfloat16)
    weights().read_flat("a.weight", 0, out)
    assert torch.equal(out, read(weights(), "a.weight").bfloat16())
