"""The sum of gradients over ranks: one all-reduce in float32, and a rank that lacks a gradient counts as zeros."""

import json

import pytest
import torch
from torch import nn

from ptune_dist.data.batches import Batch
from ptune_dist.optim.gradients import sum_gradients
from tests.commands import run_module
from tests.numerics.passes import build_base, build_model, draw_batch
from tests.optim.states import ALONE
from tests.processes import ROOT


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each of two or three ranks found: `sum_many.py`."""
    out = tmp_path_factory.mktemp("sums")
    done = run_module(str(ROOT / "tests" / "optim" / "sum_many.py"), str(out), num_ranks=request.param)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_every_rank_has_the_sum_of_all(ranks):
    num_ranks = len(ranks)
    total = float(sum(range(1, num_ranks + 1)))
    # rank r gives r + 1 everywhere, and nothing for the second tensor unless it is the last rank
    for rank in ranks:
        assert rank["sums"] == [[[total, total], [total, total]], [float(num_ranks)] * 3, [0.0]]


def test_every_rank_measures_the_losses_and_the_gradients_of_all(ranks):
    num_ranks = len(ranks)
    for rank in ranks:
        assert rank["losses"] == [sum(range(1, num_ranks + 1)), 0.5 * num_ranks]
        assert rank["norm"] == pytest.approx(num_ranks * 12**0.5, rel=1e-6)  # 12 elements, each 1 on every rank


def test_small_gradients_are_not_lost_beside_large_ones(ranks):
    # 1 + 2**-20 + ...: bfloat16 would give 1
    assert ranks[0]["precise"] == [1.0 + (len(ranks) - 1) * 2**-20] * 4


def test_all_tensors_travel_in_one_all_reduce(ranks):
    assert [rank["num_calls"] for rank in ranks] == [1] * len(ranks)


def test_alone_gradients_stay_what_they_are():
    given, lacking = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))
    given.grad = torch.arange(6.0).view(2, 3)
    sum_gradients([given, lacking], ALONE)
    assert torch.equal(given.grad, torch.arange(6.0).view(2, 3)) and torch.equal(lacking.grad, torch.zeros(4))
    sum_gradients([], ALONE)


def test_micro_batches_are_summed_in_float32_whatever_the_base_computes_in():
    model = build_model(build_base("llama").bfloat16(), "causal", "prefix")
    batches = [draw_batch("prefix", lengths, readers=[(0, 0), (0, 1)])[0] for lengths in ((9,), (5,), (17,), (30,))]

    def gradients(some: list[Batch]) -> torch.Tensor:
        model.zero_grad()
        for batch in some:
            model.losses(batch).sum().backward()
        return model.prompts[0].virtual_tokens.grad.clone()

    together = gradients(batches)
    apart = torch.stack([gradients([batch]) for batch in batches])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, apart.sum(dim=0), rtol=1e-6, atol=1e-6 * apart.abs().max().item())
