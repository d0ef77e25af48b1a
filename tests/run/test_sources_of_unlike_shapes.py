"""Several prompts to start from must be of one shape; the line says in what they differ."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ptune_dist.errors import UserError
from ptune_dist.run.parts import check_sources
from tests.numerics.prefixes import draw_prefix

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 40}


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))


def test_prompts_with_another_number_of_frozen_positions_are_told_to_set_it(base):
    sources = {"a": draw_prefix(base, 4), "b": draw_prefix(base, 4, {"num_frozen": 1})}
    with pytest.raises(UserError, match="a, b: these prompts differ in their number of frozen positions: set prompt"):
        check_sources(sources)


def test_prompts_that_hold_other_tensors_are_told_so(base):
    sources = {"a": draw_prefix(base, 4), "b": draw_prefix(base, 4, {"train_keys": False})}
    with pytest.raises(UserError, match="a, b: these prompts hold different tensors"):
        check_sources(sources)


def test_prompts_of_one_shape_are_taken(base):
    check_sources({"a": draw_prefix(base, 4), "b": draw_prefix(base, 4, seed=1)})
