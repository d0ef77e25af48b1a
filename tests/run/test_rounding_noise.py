"""Differences that rounding does not explain are told from those that it does."""

import torch

from ptune_dist.run.rounding_noise import LEAST_OUTPUTS, describe_excess

NOISE = torch.randn(44, generator=torch.Generator().manual_seed(0)) * 0.01
PLAIN = torch.full((44,), 6.0)


def excess_of(difference: torch.Tensor, step: float = 0.01) -> str:
    return describe_excess(PLAIN + difference, PLAIN, NOISE[: len(difference)], step) or ""


def test_what_is_like_the_noise_is_taken() -> None:
    assert excess_of(NOISE.flip(0)) == excess_of(torch.zeros(44)) == ""


def test_a_small_shift_a_wide_spread_and_one_far_output_are_each_found() -> None:
    assert excess_of(torch.full((44,), 0.012)).startswith(
        "the mean difference between outputs is 0.012, where rounding"
    )
    assert excess_of(NOISE.flip(0) * 4).startswith("the root mean square of differences between outputs is 0.0")
    one = torch.zeros(44)
    one[3] = 0.1
    assert excess_of(one).startswith("the largest difference between outputs is 0.1, where rounding explains 0.0")


def test_too_few_outputs_or_tiny_differences_tell_nothing() -> None:
    few = LEAST_OUTPUTS - 1
    assert describe_excess(PLAIN[:few] + 1, PLAIN[:few], NOISE[:few], 1e-4) is None
    assert excess_of(torch.full((44,), 0.012), step=0.2) == ""
