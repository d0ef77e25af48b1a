"""Useful work is counted by hand-checkable rules, the same for every side."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ptune_dist.bench.work import useful_flops
from tests.conftest import tiny_shape


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **tiny_shape("llama")))


def weights_of(base) -> int:
    return sum(p.numel() for name, p in base.named_parameters() if ".layers." in name and p.dim() == 2)


def test_a_token_is_worth_four_operations_a_weight_and_six_with_recomputation(base):
    one, two = (useful_flops(base, [n], [0], num_virtual=0, recomputes=False) for n in (1, 2))
    attention = 12 * 32 * 2  # a key: width 32, 2 layers
    assert one == 4 * weights_of(base) + attention
    assert two == 2 * 4 * weights_of(base) + 3 * attention
    again = useful_flops(base, [1], [0], num_virtual=0, recomputes=True)
    assert again == 6 * weights_of(base) + 1.5 * attention


def test_virtual_tokens_are_keys_and_no_tokens(base):
    without, with_them = (useful_flops(base, [5], [0], num_virtual=n, recomputes=False) for n in (0, 7))
    assert with_them - without == 12 * 32 * 2 * 5 * 7


def test_the_head_counts_at_supervised_positions_alone(base):
    none, some = (useful_flops(base, [5, 5], n, num_virtual=0, recomputes=False) for n in ([0, 0], [1, 2]))
    assert some - none == 4 * base.get_output_embeddings().weight.numel() * 3
