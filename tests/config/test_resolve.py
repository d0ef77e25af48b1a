"""Names and a method's own options are checked by the caller's `resolve`, for the config and each member of a sweep."""

import pytest
from pydantic import ValidationError

from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.messages import describe_unknown_key, find_key, nearest_key
from ptune_dist.config.sweep import expand_sweep, member_config
from ptune_dist.errors import UserError
from tests.config.resolving import SMALL, resolve


@pytest.fixture
def load(tmp_path):
    def load_text(content: str, *overrides: str):
        path = tmp_path / "c.yaml"
        path.write_text(content, encoding="utf-8")
        return load_config(path, overrides, resolve=resolve)

    return load_text


@pytest.fixture
def error_of(load, tmp_path):
    def refuse(content: str, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load(content, *overrides)
        return str(caught.value).replace(str(tmp_path / "c.yaml"), "FILE")

    return refuse


def options_of(config) -> dict:
    return config.prompt.model_extra


def test_a_methods_defaults_are_filled_in_and_its_options_may_be_given(load):
    assert options_of(load(SMALL)) == {}
    config = load(SMALL + "prompt: {method: layered, num_layers: 3}\n")
    assert options_of(config) == {"num_layers": 3, "width": None}
    assert (config.prompt.num_layers, config.prompt.width, config.prompt.num_virtual_tokens) == (3, None, 20)
    assert options_of(load(SMALL, "prompt.method=layered", "prompt.width=64")) == {"num_layers": 2, "width": 64}


def test_without_a_resolve_options_are_kept_as_given(tmp_path):
    (tmp_path / "c.yaml").write_text(SMALL + "prompt: {method: other, depth: [1, {a: 2}]}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.prompt.method == "other" and options_of(config) == {"depth": [1, {"a": 2}]}
    with pytest.raises(ValidationError):
        config.prompt.depth = 5


def test_a_resolved_config_reads_back_equal(load):
    for prompt in ("{method: layered, num_layers: 3}", "{}"):
        config = load(SMALL + f"prompt: {prompt}\n")
        assert load(render_config(config)) == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("prompt.num_layer=3", "unknown key prompt.num_layer, did you mean prompt.num_layers?"),
        ("prompt.zzzzqqqq=3", "unknown key prompt.zzzzqqqq"),
        ("prompt.num_layers=0", "prompt.num_layers: Input should be greater than 0, got 0"),
        ("prompt.method=other", "prompt.method: unknown method 'other'"),
        ("train.objective=other", "train.objective: unknown objective 'other'"),
    ],
)
def test_what_resolve_refuses_is_one_line_with_its_place(error_of, override, message):
    key, _, value = override.partition("=")
    assert error_of(SMALL + "prompt: {method: layered}\n", override) == f"command line: {message}"
    section, _, leaf = key.partition(".")
    method = "method: layered, " if section == "prompt" and leaf != "method" else ""
    assert error_of(SMALL + f"{section}: {{{method}{leaf}: {value}}}\n") == f"FILE: {message}"


def test_an_option_of_another_method_is_named_with_its_method(error_of):
    assert error_of(SMALL + "prompt: {num_layers: 3}\n") == (
        "FILE: prompt.num_layers is for layered, this is prompt_tuning"
    )


def test_the_place_is_that_of_the_key_and_not_of_any_override(error_of):
    content = SMALL + "prompt: {num_layers: 3}\n"
    assert error_of(content, "train.max_steps=5").startswith("FILE: prompt.num_layers")
    assert error_of(content, "prompt.method=prompt_tuning").startswith("FILE: prompt.num_layers")


# Members


def test_methods_and_their_options_may_be_swept(load):
    config = load(SMALL + "sweep: [{prompt.method: layered, prompt.num_layers: 4}, {prompt.method: prompt_tuning}]\n")
    members = expand_sweep(config, resolve)
    assert list(members) == ["method=layered,num_layers=4", "method=prompt_tuning"]
    assert [options_of(member) for member in members.values()] == [{"num_layers": 4, "width": None}, {}]
    assert member_config(config, "method=layered,num_layers=4", resolve).prompt.num_layers == 4
    assert load(render_config(config)) == config


def test_members_of_another_method_do_not_get_the_defaults_of_the_method_outside(load):
    config = load(SMALL + "prompt: {method: layered}\nsweep: {prompt.method: [layered, prompt_tuning]}\n")
    assert [options_of(m) for m in expand_sweep(config, resolve).values()] == [{"num_layers": 2, "width": None}, {}]


def test_a_method_that_every_member_gives_need_not_be_given_outside_the_sweep(load):
    config = load(SMALL + "sweep: {prompt.method: [layered], prompt.num_layers: [1, 2]}\nprompt: {width: 8}\n")
    assert [m.prompt.num_layers for m in expand_sweep(config, resolve).values()] == [1, 2]


@pytest.mark.parametrize(
    "sweep, message",
    [
        ("{prompt.num_layers: [1]}", "sweep: num_layers=1: prompt.num_layers is for layered, this is prompt_tuning"),
        (
            "{prompt.num_virtual_token: [1]}",
            "sweep: num_virtual_token=1: unknown key prompt.num_virtual_token, did you mean prompt.num_virtual_tokens?",
        ),
        (
            "{prompt.method: [layered], prompt.num_layers: [0]}",
            "sweep: method=layered,num_layers=0: prompt.num_layers: Input should be greater than 0, got 0",
        ),
        (
            "[{prompt.method: layered}, {prompt.method: layered, prompt.num_layers: 2}]",
            "sweep: method=layered and method=layered,num_layers=2 are the same member, leave one out",
        ),
        ("{prompt.placement: [infix]}", "sweep.prompt.placement: not a key that members can differ in"),
        ("{prompt.a.b: [1]}", "sweep.prompt.a.b: not a key that members can differ in"),
    ],
)
def test_what_resolve_refuses_of_a_member_names_the_member(error_of, sweep, message):
    assert error_of(SMALL + f"sweep: {sweep}\n") == f"FILE: {message}"
    assert error_of(SMALL, f"sweep={sweep}") == f"command line: {message}"


# Messages


def test_the_nearest_key_is_a_whole_key_or_nothing():
    known = ["train.learning_rate", "prompt.num_layers"]
    assert nearest_key("prompt.num_layer", known) == "prompt.num_layers"
    assert nearest_key("optimization.schedules.learning_rates", known) == "train.learning_rate"
    assert nearest_key("zzzz", known) == ""
    assert nearest_key("train.zzzz", ["train", *known]) == ""  # the section is not what is meant
    assert describe_unknown_key("zzzz", known) == "unknown key zzzz"


@pytest.mark.parametrize(
    "message, key",
    [
        ("prompt.a_b is for x, this is y", "prompt.a_b"),
        ("prompt.init: text needs prompt.init_text", "prompt.init"),
        ("unknown key prompt.foo, did you mean prompt.fool?", "prompt.foo"),
        ("Something else", "Something"),
        ("", ""),
    ],
)
def test_the_key_of_a_message_is_found(message, key):
    assert find_key(message) == key
