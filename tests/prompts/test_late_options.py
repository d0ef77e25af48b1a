"""What late prompts and prefixes of the upper layers are refused for, and where their rows can be cached."""

import pytest
import torch

from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from ptune_dist.prompts.export import check_for_peft, check_for_vectors, export_prompt_embeds
from ptune_dist.prompts.late_prompt import LatePrompt, LatePromptOptions
from ptune_dist.prompts.method import BaseFacts, check_start_layer
from ptune_dist.prompts.prefix_options import PrefixOptions
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.start import Start
from ptune_dist.prompts.store import save_prompt
from ptune_dist.run.reading import build_reading
from ptune_dist.run.resolve import resolve
from ptune_dist.tiny.make import build_tokenizer
from tests.conftest import write_config

CACHES = ["train.context_cache_gib=1", "train.context_cache_gpu_gib=1", "train.context_cache_dir=cache"]


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path / "c.json")


def error_of(path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        build_reading(load_config(path, list(overrides), resolve=resolve))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("override", CACHES)
def test_contexts_are_cached_where_the_placement_has_some(path, override, tiny_bases):
    marker = "data.template={{ text }}{{ prompt }}"
    for placement in ("infix", "template"):
        build_reading(load_config(path, [override, f"prompt.placement={placement}", marker], resolve=resolve))
    message = error_of(path, override, marker)
    assert override.partition("=")[0] in message and "placement prefix has no contexts" in message
    assert message.endswith("infix, template")
    t5 = f"model.path={tiny_bases['t5']}"
    build_reading(load_config(path, [override, t5, "prompt.placement=decoder"], resolve=resolve))
    for placement in ("prefix", "encoder"):
        message = error_of(path, override, t5, f"prompt.placement={placement}")
        assert f"placement {placement} has no contexts" in message and message.endswith("prompt.placement to decoder")


@pytest.mark.parametrize("override", CACHES)
def test_rows_are_cached_where_prompts_enter_late(path, override):
    build_reading(load_config(path, [override, "prompt.method=late_prompt"], resolve=resolve))
    prefix = "prompt.method=prefix_tuning"
    build_reading(load_config(path, [override, prefix, "prompt.from_layer=1"], resolve=resolve))
    build_reading(load_config(path, [override, prefix, "sweep.prompt.from_layer=[1,2]"], resolve=resolve))
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
        ValueError, match=f"^prompt.x: {layer} is not a layer above the first of 4: choose one from 1 to 3"
    ):
        check_start_layer(layer, BaseFacts(8, num_first_layers=4), "prompt.x")
    with pytest.raises(ValueError, match="^prompt.x: .* of 2: choose 1$"):
        check_start_layer(layer, BaseFacts(8, num_first_layers=2), "prompt.x")
    with pytest.raises(ValueError, match="^prompt.x: this base has one layer, and a prompt can enter above"):
        check_start_layer(layer, BaseFacts(8, num_first_layers=1), "prompt.x")
    with pytest.raises(ValueError, match="^prompt.x: a prompt cannot enter in the middle of this base"):
        check_start_layer(layer, BaseFacts(8), "prompt.x")


def test_what_no_other_system_can_serve_is_refused_in_one_line(tmp_path):
    late = {"late_tokens": torch.zeros(4, 8)}
    facts = {"method": "late_prompt", "placement": "infix"}
    with pytest.raises(
        UserError, match="^--to peft: PEFT has no method whose .* enter at a later layer: use --to vectors$"
    ):
        check_for_peft(late, facts)
    with pytest.raises(UserError, match="^--to prompt-embeds: this prompt enters at a later.*: use --to vectors$"):
        export_prompt_embeds(late, None, [], torch.float32, tmp_path)
    with pytest.raises(UserError, match="^--to vectors: this is for late_prompt, .*, not for prompt_tuning$"):
        check_for_vectors({"virtual_tokens": late["late_tokens"]}, {})
    with pytest.raises(UserError, match="^--to vectors: this prompt has a generator, so"):
        check_for_vectors(late | {"generator.up": torch.zeros(2, 8)}, facts)
    check_for_vectors(late, facts)
    generated = late | {"generator.up": torch.zeros(2, 8)}  # no other system takes these
    with pytest.raises(UserError, match="enter at a later layer$"):
        check_for_peft(generated, facts)
    with pytest.raises(UserError, match="has no input embeddings$"):
        export_prompt_embeds(generated, None, [], torch.float32, tmp_path)
    with pytest.raises(UserError, match="^--to prompt-embeds: this run trained no virtual tokens: use --to peft$"):
        export_prompt_embeds({"trainable_tokens": torch.zeros(2, 8)}, None, [], torch.float32, tmp_path)
    facts = {"method": "prefix_tuning", "placement": "prefix", "options": {"from_layer": 2}}
    upper = {"prefix_keys": torch.zeros(2, 4, 2, 8), "prefix_values": torch.zeros(2, 4, 2, 8)}
    with pytest.raises(UserError, match="^--to peft: PEFT's prefixes are in all layers, this one begins with"):
        check_for_peft(upper, facts)
    whole = upper | {"lower_keys": torch.ones(2, 4, 2, 8), "lower_values": torch.ones(2, 4, 2, 8)}
    check_for_peft(whole, facts)
    adapter = PrefixTuning.to_peft(whole)
    assert adapter.settings["num_layers"] == 4
    assert torch.equal(adapter.prompt_embeddings, torch.tensor([1.0, 0.0]).repeat_interleave(64).expand(4, -1))


def facts_of() -> BaseFacts:
    return BaseFacts(8, num_layers=4, num_key_value_heads=2, head_width=3, hidden_size=8, num_first_layers=4)


def start_of(kind: str, asked: str, placement: str = "prefix", file: str | None = None) -> Start:
    rows = lambda: [[5, 6, 7]]  # noqa: E731
    return Start(
        kind, 0, build_tokenizer(), lambda ids: torch.zeros(len(ids), 8), file=file, asked=asked, placement=placement,
        rows=rows, text="ab",
    )  # fmt: skip


def test_layers_below_a_prefix_keep_the_start_and_a_run_is_trained_further(tmp_path):
    options = PrefixOptions(from_layer=3)
    prompt = PrefixTuning.build(options, 4, facts_of(), start_of("text", "text"))
    assert prompt.prefix_keys.shape == (1, 3, 2, 3) and len(prompt.start_tokens) == 4
    draw = torch.Generator().manual_seed(0)
    computed = [torch.randn(4, 4, 2, 3, generator=draw) for _ in range(2)]
    prompt.begin_from(*computed)
    found = prompt()
    assert found.start_layer == 3
    assert torch.equal(found.lower_keys, computed[0][:3]) and torch.equal(found.keys, computed[0][3:])
    assert torch.equal(found.lower_values, computed[1][:3]) and torch.equal(found.values, computed[1][3:])
    stored = {name: tensor.detach() for name, tensor in prompt.state_dict().items()} | prompt.plain()
    again = PrefixTuning.build(options, 4, facts_of(), start_of("nothing", "text"))
    again.load_state_dict({name: again.take(stored)[name] for name in again.state_dict()})
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.plain().items())
    save_prompt(tmp_path, stored, {})
    further = PrefixTuning.build(options, 4, facts_of(), start_of("file", "file", file=str(tmp_path)))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in further.plain().items())


@pytest.mark.parametrize(
    ("asked", "placement", "given", "has_lower"),
    [
        ("text", "prefix", None, True),
        ("rows", "prefix", "none", False),
        ("random", "prefix", None, False),
        ("text", "infix", None, True),
        ("zero", "template", None, False),
    ],
)
def test_lower_layers_follow_from_the_start_and_the_placement(asked, placement, given, has_lower):
    options = PrefixOptions(from_layer=2, lower_layers=given)
    prompt = PrefixTuning.build(options, 4, facts_of(), start_of(asked, asked, placement))
    assert (prompt().lower_keys is not None) == has_lower and len(prompt().keys) == 2


@pytest.mark.parametrize(
    ("options", "asked", "placement", "message"),
    [
        ({"from_layer": 4}, "text", "prefix", "prompt.from_layer: 4 is not a layer above the first of 4"),
        ({"lower_layers": "none"}, "text", "prefix", "prompt.lower_layers is for layers below prompt.from_layer"),
        ({"from_layer": 1, "lower_layers": "start"}, "zero", "prefix", "prompt.lower_layers: start needs a start from"),
    ],
)
def test_prefix_options_that_do_not_fit_are_refused(options, asked, placement, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PrefixTuning.build(PrefixOptions(**options), 4, facts_of(), start_of(asked, asked, placement))


def test_a_generator_starts_by_adding_nothing_and_is_trained_further(tmp_path):
    LatePrompt.build(LatePromptOptions(**LatePromptOptions().model_dump()), 3, facts_of(), start_of("random", "random"))
    options = LatePromptOptions(generator="pooled", generator_hidden_size=32)
    prompt = LatePrompt.build(options, 3, facts_of(), start_of("random", "random"))
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 8, generator=draw) for count in (1, 2, 7)]
    assert all(torch.equal(own.vectors, prompt().vectors) for own in prompt.of_rows(rows))
    prompt.generator.up.data = torch.randn(32, 8, generator=draw)
    save_prompt(tmp_path, prompt.plain(), {})
    again = LatePrompt.build(options, 3, facts_of(), start_of("file", "file", file=str(tmp_path)))
    for ours, theirs in zip(again.of_rows(rows), prompt.of_rows(rows), strict=True):
        assert torch.equal(ours.vectors, theirs.vectors) and not torch.equal(ours.vectors, prompt().vectors)
    with pytest.raises(ValueError, match="^prompt.init_file: that prompt has a generator: set prompt.generator=pooled"):
        LatePrompt.build(LatePromptOptions(), 3, facts_of(), start_of("file", "file", file=str(tmp_path)))


def test_a_prompt_of_another_layer_is_no_start(tmp_path):
    save_prompt(tmp_path / "first", {"late_tokens": torch.zeros(3, 8)}, {"options": {"start_layer": 1}})
    save_prompt(tmp_path / "middle", {"late_tokens": torch.zeros(3, 8)}, {"options": {"start_layer": None}})
    for layer, own, other in ((1, "first", "middle"), (2, "middle", "first"), (None, "middle", "first")):
        options = LatePromptOptions(start_layer=layer)
        LatePrompt.build(options, 3, facts_of(), start_of("file", "file", file=str(tmp_path / own)))
        message = f"^prompt.init_file: that prompt enters at layer .*: set prompt.start_layer={1 if layer != 1 else 2}$"
        with pytest.raises(ValueError, match=message):
            LatePrompt.build(options, 3, facts_of(), start_of("file", "file", file=str(tmp_path / other)))


@pytest.mark.parametrize(
    ("options", "placement", "message"),
    [
        ({"generator_hidden_size": 4}, "prefix", "prompt.generator_hidden_size is for a generator: set prompt.gen"),
        ({"generator": "pooled"}, "infix", "prompt.generator: pooled reads whole inputs, which placement infix"),
    ],
)
def test_options_of_a_generator_that_do_not_fit_are_refused(options, placement, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LatePrompt.build(LatePromptOptions(**options), 3, facts_of(), start_of("random", "random", placement))


def test_a_late_prompt_starts_from_hidden_states_of_its_layer():
    prompt = LatePrompt.build(LatePromptOptions(), 3, facts_of(), start_of("rows", "rows"))
    assert (list(prompt.start_tokens), prompt.reads_layer, prompt().start_layer) == ([5, 6, 7], 2, 2)
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    prompt.begin_from(hidden)
    assert torch.equal(prompt().vectors, hidden)
    with pytest.raises(ValueError, match="^prompt.start_layer: 4 is not a layer above the first of 4"):
        LatePrompt.build(LatePromptOptions(start_layer=4), 3, facts_of(), start_of("rows", "rows"))
