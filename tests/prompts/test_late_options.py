"""What late prompts and prefixes of the upper layers are refused for, and where their rows can be cached."""

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, check_start_layer
from ptune_dist.run.resolve import resolve
from tests.conftest import write_config

CACHES = ["train.context_cache_gib=1", "train.context_cache_gpu_gib=1", "train.context_cache_dir=cache"]


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path / "c.json")


def error_of(path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides), resolve=resolve)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("override", CACHES)
def test_contexts_are_cached_where_the_placement_has_some(path, override):
    marker = "data.template={{ text }}{{ prompt }}"
    for placement in ("infix", "decoder", "template"):
        load_config(path, [override, f"prompt.placement={placement}", marker], resolve=resolve)
    for placement in ("prefix", "encoder"):
        message = error_of(path, override, f"prompt.placement={placement}", marker)
        assert override.partition("=")[0] in message and f"placement {placement} has no contexts" in message
        assert "infix, template, decoder" in message


@pytest.mark.parametrize("override", CACHES)
def test_rows_are_cached_where_prompts_enter_late(path, override):
    load_config(path, [override, "prompt.method=late_prompt"], resolve=resolve)
    prefix = "prompt.method=prefix_tuning"
    load_config(path, [override, prefix, "prompt.from_layer=1"], resolve=resolve)
    load_config(path, [override, prefix, "sweep.prompt.from_layer=[1,2]"], resolve=resolve)
    assert "placement prefix has no contexts" in error_of(path, override, prefix, "prompt.from_layer=0")
    assert "placement prefix has no contexts" in error_of(path, override, prefix, "sweep.prompt.from_layer=[0,1]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["prompt.method=late_prompt", "prompt.start_layer=0"],
            "prompt.start_layer: Input should be greater than or equal to 1, got 0",
        ),
        (["prompt.method=late_prompt", "prompt.from_layer=1"], "prompt.from_layer is for prefix_tuning, this is late_"),
        (["prompt.start_layer=1"], "prompt.start_layer is for late_prompt, this is prompt_tuning"),
        (
            ["prompt.method=prefix_tuning", "prompt.from_layer=-1"],
            "prompt.from_layer: Input should be greater than or equal to 0, got -1",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(path, overrides, message):
    assert message in error_of(path, *overrides)


@pytest.mark.parametrize("layer", [-1, 0, 4, 9])
def test_a_layer_that_the_base_lacks_is_refused(layer):
    with pytest.raises(
        ValueError, match=f"^prompt.x: {layer} is no layer above the first one of 4: choose one from 1 to 3"
    ):
        check_start_layer(layer, BaseFacts(8, num_first_layers=4), "prompt.x")
    with pytest.raises(ValueError, match="^prompt.x: the layers of this base are no plain stack"):
        check_start_layer(layer, BaseFacts(8), "prompt.x")
