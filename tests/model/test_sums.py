"""Sums of losses by reader and member: those of `index_add`, without an operation whose order differs between runs."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics.passes import build_base, build_model, draw_batch

# Their result on CUDA depends on the order in which threads come: index_put is sorted there, these are not.
UNORDERED = ("index_add", "scatter_add", "index_reduce", "scatter_reduce", "cumsum", "bincount", "put_")


class Names(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    return build_model(build_base("llama"), "causal", "prefix")


@pytest.mark.parametrize("groups", [[0, 0, 2, 2, 2, 4], [4, 0, 2, 0, 2, 2], []])
def test_sums_and_their_gradients_are_those_of_index_add(model, groups):
    values = torch.linspace(-1, 2, len(groups), requires_grad=True)
    numbers = np.array(groups, np.int64)
    weights = torch.arange(1.0, 6)
    found = model.sum_by(values, numbers, 5)
    wanted = torch.zeros(5).index_add(0, torch.from_numpy(numbers), values)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(*(torch.autograd.grad(s, values, weights) for s in (found, wanted)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_group_that_is_not_a_number_leaves_the_others(model):
    values = torch.tensor([1.0, torch.nan, 2.0])
    assert model.sum_by(values, np.array([0, 1, 2]), 3).tolist()[::2] == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_losses_are_added_in_a_fixed_order(kind):
    placement = "encoder" if kind == "t5" else "prefix"
    model = build_model(build_base(kind), "seq2seq" if kind == "t5" else "causal", placement)
    batch, _ = draw_batch(placement)
    with Names() as names:
        losses = model.losses(batch)
        if kind == "t5":  # segments that are padded select in forward, and add where they selected in backward
            losses.sum().backward()
    assert "segment_reduce" in names.found
    assert not [name for name in names.found if name.rstrip("_") in UNORDERED]
