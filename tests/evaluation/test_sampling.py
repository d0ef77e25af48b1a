"""Tokens are sampled with their probabilities, among those that temperature, top-k and top-p leave."""

import pytest
import torch

from ptune_dist.evaluation.sampling import GumbelNoise, build_sampler, seed_of_row

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, -8.0])
NUM_ROWS = 4_000


def sample(sampling: dict, num_rows: int = NUM_ROWS) -> torch.Tensor:
    """The share of rows that get each token."""
    sampler = build_sampler(sampling, 0, range(num_rows), torch.device("cpu"))
    chosen = sampler(torch.zeros(num_rows, 0, dtype=torch.long), LOGITS.expand(num_rows, -1).clone()).argmax(dim=-1)
    return torch.bincount(chosen, minlength=len(LOGITS)) / num_rows


def softmax_of(kept: list[int], temperature: float = 1.0) -> torch.Tensor:
    scores = torch.full_like(LOGITS, -torch.inf)
    scores[kept] = LOGITS[kept] / temperature
    return scores.softmax(dim=0)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1.0}, softmax_of([0, 1, 2, 3, 4, 5])),
        ({"temperature": 2.0}, softmax_of([0, 1, 2, 3, 4, 5], 2.0)),
        ({"top_k": 2}, softmax_of([0, 1])),
        ({"top_p": 0.8}, softmax_of([0, 1])),  # 0.63 and 0.23
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, softmax_of([0, 1], 0.5)),
    ],
)
def test_tokens_have_their_probabilities(sampling, expected):
    found = sample(sampling)
    bound = 4 * (expected * (1 - expected) / NUM_ROWS).sqrt()  # four standard deviations
    assert ((found - expected).abs() <= bound + 1e-9).all(), (found, expected)


def test_without_sampling_answers_are_greedy():
    assert build_sampler(None, 0, [0], torch.device("cpu")) is None


def test_noise_is_the_row_s_whatever_stands_beside_it_and_changes_from_token_to_token():
    scores = torch.zeros(3, 5)
    noise = GumbelNoise(7, [4, 9, 2], torch.device("cpu"))
    first, second = noise(None, scores), noise(None, scores)
    assert not torch.equal(first, second) and len(set(first[:, 0].tolist())) == 3
    alone = GumbelNoise(7, [9], torch.device("cpu"))
    assert torch.equal(alone(None, scores[:1])[0], first[1]) and torch.equal(alone(None, scores[:1])[0], second[1])


def test_seeds_of_rows_do_not_repeat_from_seed_to_seed():
    assert len({seed_of_row(seed, row) for seed in range(30) for row in range(30)}) == 900


def test_a_token_that_is_left_out_is_never_sampled_and_noise_is_finite():
    scores = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(5000, -1)
    noisy = GumbelNoise(0, range(5000), torch.device("cpu"))(None, scores)
    assert (noisy[:, 1] == -torch.inf).all() and noisy[:, [0, 2]].isfinite().all()
