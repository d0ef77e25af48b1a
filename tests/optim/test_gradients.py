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

NUM_RANKS = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of three ranks found: `sum_many.py`."""
    out = tmp_path_factory.mktemp("sums")
    done = run_module(str(ROOT / "tests" / "optim" / "sum_many.py"), str(out), num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def test_every_rank_has_the_sum_of_all(ranks):
    assert ranks[0]["sums"] == ranks[1]["sums"] == ranks[2]["sums"]
    # rank r gives r + 1 everywhere, and nothing for the second tensor unless it is the last rank
    assert ranks[0]["sums"] == [[[6.0, 6.0], [6.0, 6.0]], [3.0] * 3, [0.0]]


def test_small_gradients_are_not_lost_beside_large_ones(ranks):
    assert ranks[0]["precise"] == [1.0 + 2 * 2**-20] * 4  # 1 + 2**-20 + 2**-20: bfloat16 would give 1


def test_all_tensors_travel_in_one_all_reduce(ranks):
    assert [rank["num_calls"] for rank in ranks] == [1] * NUM_RANKS


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
