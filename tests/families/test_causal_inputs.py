"""Bases whose layers read token ids again are refused before training."""

import pytest
from transformers import Gemma3nTextConfig, Gemma4TextConfig, GPT2Config, PretrainedConfig

from ptune_dist.errors import UserError
from ptune_dist.families.causal import check_inputs


@pytest.mark.parametrize("kind", [Gemma3nTextConfig, Gemma4TextConfig])
def test_per_layer_embeddings_are_refused(kind: type[PretrainedConfig]) -> None:
    with pytest.raises(UserError, match="hidden_size_per_layer_input"):
        check_inputs(kind(hidden_size_per_layer_input=8), "some/base")


def test_bases_without_them_are_taken() -> None:
    check_inputs(Gemma4TextConfig(hidden_size_per_layer_input=0), "some/base")
    check_inputs(GPT2Config(), "some/base")
