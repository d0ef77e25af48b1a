"""What a method makes of a config: members with and without virtual tokens, and placements with contexts."""

import pytest

from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.errors import UserError
from ptune_dist.run.resolve import resolve
from tests.config.resolving import SMALL


@pytest.fixture
def load(tmp_path):
    def load_text(content: str):
        (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
        return load_config(tmp_path / "c.yaml", resolve=resolve)

    return load_text


@pytest.mark.parametrize("outside", ["", "prompt: {num_virtual_tokens: 7}\n"])
@pytest.mark.parametrize("methods", ["[adaption_prompt, prompt_tuning]", "[prompt_tuning, adaption_prompt]"])
def test_a_number_of_virtual_tokens_outside_a_sweep_is_for_the_methods_that_take_some(load, outside, methods):
    config = load(SMALL + outside + f"sweep: {{prompt.method: {methods}}}\n")
    found = {m.prompt.method: m.prompt.num_virtual_tokens for m in expand_sweep(config, resolve).values()}
    assert found == {"prompt_tuning": 7 if outside else 20, "adaption_prompt": 0}
    assert load(render_config(config)) == config


def test_a_number_for_a_method_without_virtual_tokens_is_refused_beside_a_sweep_of_other_keys(load):
    with pytest.raises(UserError, match="adaption_prompt has no virtual tokens"):
        load(SMALL + "prompt: {method: adaption_prompt, num_virtual_tokens: 7}\nsweep: {seed: [0, 1]}\n")
