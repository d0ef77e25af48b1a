"""No row may change another's rotary frequencies."""

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ptune_dist.base.rotary import fixed_positions
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError
from ptune_dist.run.parts import check_positions
from ptune_dist.run.reading import limit_default

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONG |= {"original_max_position_embeddings": 16, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def make_shape(rope: dict[str, Any], positions: int) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_theta": 10000.0, **rope}
    return LlamaConfig(vocab_size=32, max_position_embeddings=positions, rope_parameters=rope, **sizes)


def rotate_first(shape: LlamaConfig, length: int) -> torch.Tensor:
    """What the second position is rotated by in a pass of `length` positions."""
    rotary = LlamaRotaryEmbedding(shape)
    return rotary(torch.zeros(1, length, 16), torch.arange(length)[None])[0][0, 1]


@pytest.mark.parametrize(("rope", "positions"), [(LONG, 64), (DYNAMIC, 16)])
def test_frequencies_are_fixed_exactly_as_far_as_it_says(rope: dict[str, Any], positions: int) -> None:
    shape = make_shape(rope, positions)
    assert fixed_positions(shape) == 16
    assert torch.equal(rotate_first(shape, 4), rotate_first(shape, 16))
    assert not torch.equal(rotate_first(shape, 4), rotate_first(shape, 17))


@pytest.mark.parametrize(
    "shape",
    [make_shape(LINEAR, 16), make_shape({"rope_type": "default"}, 16), GPT2Config(), Gemma3TextConfig()],
    ids=lambda shape: shape.model_type,
)
def test_other_bases_have_no_limit(shape: Any) -> None:
    assert fixed_positions(shape) is None


def make_config(max_length: int) -> Config:
    return Config.model_validate(
        {
            "output_dir": "out",
            "model": {"path": "some/base"},
            "prompt": {"num_virtual_tokens": 4},
            "data": {"train": "rows.jsonl", "template": "{{ a }}", "target": "{{ b }}", "max_length": max_length},
        }
    )


def test_rows_that_may_be_longer_are_refused_and_the_default_fits() -> None:
    base = LlamaForCausalLM(make_shape(LONG, 64))
    check_positions(make_config(12), base)
    with pytest.raises(UserError, match="needs 17 positions.* first 16.*data.max_length=12"):
        check_positions(make_config(13), base)
    assert limit_default(base.config, None, 4) == 12
    assert limit_default(base.config, 10, 4) == 6
    assert limit_default(make_shape(LINEAR, 64), None, 4) == 512
