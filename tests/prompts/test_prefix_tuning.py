"""Prompts of keys and values by themselves: their start, what is trained, PEFT's files, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ptune_dist.config.sections import PromptConfig
from ptune_dist.errors import UserError
from ptune_dist.prompts.build import check_options, choose_start
from ptune_dist.prompts.export import check_for_peft, export_peft
from ptune_dist.prompts.method import BaseFacts
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.start import NOTHING, Start
from ptune_dist.prompts.store import save_prompt
from ptune_dist.tiny.make import build_tokenizer

TOKENIZER = build_tokenizer()
FACTS = BaseFacts(width=16, num_layers=3, num_key_value_heads=2, head_width=4)
SHAPE = (3, 5, 2, 4)
ROWS = [[10, 11, 12], [13], [14, 15]]


def build(with_start: bool = True, num: int = 5, facts: BaseFacts = FACTS, rows=lambda: iter(ROWS), **given):
    prompt = PromptConfig(method="prefix_tuning", num_virtual_tokens=num, **given)
    start = Start(
        kind=choose_start(prompt) if with_start else NOTHING,
        seed=3,
        tokenizer=TOKENIZER,
        lookup=lambda ids: torch.zeros(len(ids), 16),
        text=prompt.init_text,
        file=prompt.init_file,
        asked=choose_start(prompt),
        rows=rows,
    )
    return PrefixTuning.build(check_options(prompt), num, facts, start)


def error_of(**given) -> str:
    with pytest.raises((ValueError, UserError)) as caught:
        build(**given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbers(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [10, 11, 12, 13, 14]),  # rows, as many as fill the positions
        ({"init": "rows", "init_rows": 1}, [10, 11, 12, 10, 11]),
        ({"init": "rows", "init_rows": 3, "num": 8}, [10, 11, 12, 13, 14, 15, 10, 11]),
        ({"init_text": "ab"}, (TOKENIZER.encode("ab") * 3)[:5]),
        ({"init": "text", "init_text": "abcdefgh"}, TOKENIZER.encode("abcdefgh")[:5]),
        ({"init": "zero"}, []),
        ({"rows": None}, []),  # nothing will be trained
        ({"init_text": "ab", "with_start": False}, []),
    ],
)
def test_the_tokens_to_start_from_are_those_of_the_text_or_of_the_first_rows(given, wanted):
    assert list(build(**given).start_tokens) == wanted


def test_a_text_begins_as_the_tokenizer_begins_one():
    class Begun:
        def __init__(self):
            self.eos_token_id = self.sep_token_id = 0

        def __call__(self, text, **_):
            return {"input_ids": [1, 9], "special_tokens_mask": [1, 0]}

        def encode(self, text, add_special_tokens):
            return [7, 8]

    start = Start("text", 0, Begun(), lambda ids: torch.zeros(len(ids), 4), text="x")
    assert (start.tokens(6), start.tokens(2), start.tokens(1)) == ([1, 7, 8, 7, 8, 7], [1, 7], [1])


@pytest.mark.parametrize(
    ("given", "num_frozen"),
    [
        ({}, 1),
        ({"init_text": "ab"}, 1),
        ({"init_text": "ab", "with_start": False}, 1),  # as a run that is resumed finds it
        ({"init": "random"}, 0),
        ({"init": "zero"}, 0),
        ({"init": "random", "num_frozen": 2}, 2),
        ({"init_text": "ab", "num_frozen": 0}, 0),
        ({"num": 1}, 0),  # one position at least is trained
    ],
)
def test_the_first_position_stays_where_it_is_that_of_a_text(given, num_frozen):
    prompt = build(**given)
    assert prompt.num_frozen == num_frozen
    assert prompt.prefix_keys.shape[1] == prompt.num_virtual_tokens - num_frozen


@pytest.mark.parametrize("options", [{}, {"num_frozen": 2}, {"train_keys": False}, {"reparameterization": "mlp"}])
def test_a_prompt_begins_from_what_the_base_computes_and_is_stored_whole(options, tmp_path):
    prompt = build(init_text="ab", **options)
    keys, values = numbers()
    prompt.begin_from(keys, values)
    found = prompt()
    assert torch.equal(found.keys, keys) and torch.equal(found.values, values)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.1)
    moved = prompt.plain()
    frozen = prompt.num_frozen
    assert torch.equal(moved["prefix_keys"][:, :frozen], keys[:, :frozen])
    assert torch.equal(moved["prefix_keys"], keys) == (options.get("train_keys") is False)
    assert not (moved["prefix_values"][:, frozen:] == values[:, frozen:]).any()
    stored = {name: tensor.detach() for name, tensor in prompt.state_dict().items()} | moved  # a prompt folder
    again = build(init_text="ab", with_start=False, **options)
    again.load_state_dict({name: again.take(stored)[name] for name in again.state_dict()})
    assert all(torch.equal(tensor, moved[name]) for name, tensor in again.plain().items())
    save_prompt(tmp_path, stored, {})
    for count in (None, frozen, 0, 3):
        further = build(init="file", init_file=str(tmp_path), **options | {"num_frozen": count})
        assert further.num_frozen == (frozen if count is None else count)
        assert all(torch.equal(tensor, moved[name]) for name, tensor in further.plain().items())
        if "reparameterization" in options and count == frozen:
            assert torch.equal(further.embedding.weight, prompt.embedding.weight)


def test_a_checkpoint_with_another_number_of_frozen_positions_is_refused(tmp_path):
    given = {"init": "file", "init_file": str(tmp_path / "gone"), "with_start": False}
    stored = build(init="random", num_frozen=1).state_dict()
    with pytest.raises(UserError, match="set prompt.num_frozen=1$"):
        build(**given).take(stored)
    further = build(**given, num_frozen=1)
    further.load_state_dict(further.take(stored))


def test_what_a_file_holds_in_place_of_keys_is_named(tmp_path):
    save_prompt(tmp_path / "prompt", {"virtual_tokens": torch.zeros(5, 16)}, {"method": "p_tuning"})
    message = error_of(init="file", init_file=str(tmp_path))
    assert "prompt.safetensors holds no prefix_keys, but a prompt of p_tuning: " in message
    (tmp_path / "empty").mkdir()
    assert "empty has none of prompt/prompt.safetensors, " in error_of(init="file", init_file=str(tmp_path / "empty"))


def test_a_prompt_of_another_length_is_named(tmp_path):
    save_prompt(tmp_path, build(init="random").plain(), {})
    message = error_of(init="file", init_file=str(tmp_path), num=7)
    assert message.endswith("has 5 positions, and this prompt 7: set prompt.num_virtual_tokens=5")


DEEP = BaseFacts(width=16, num_layers=4, num_key_value_heads=2, head_width=4, num_first_layers=4)


def test_a_prompt_without_lower_layers_is_trained_further_without_them(tmp_path):
    options = {"from_layer": 2}
    first = build(facts=DEEP, init="random", **options)
    save_prompt(tmp_path, first.plain(), {"options": options})
    given = {"facts": DEEP, "init": "file", "init_file": str(tmp_path)}
    again = build(**given, **options)
    assert torch.equal(again().keys, first().keys) and again().lower_keys is None
    assert again.settled_options() == {"num_frozen": 0, "lower_layers": "none"}
    upper = build(**given, from_layer=3)
    assert torch.equal(upper().keys, first().keys[1:]) and upper().lower_keys is None
    for more in ({}, {"from_layer": 1}, {"from_layer": 2, "lower_layers": "start"}):
        message = error_of(**given, **more)
        assert "has keys and values of the layers from 2 on, and this prompt needs those from" in message
        assert message.endswith("set prompt.from_layer=2 and prompt.lower_layers=none")


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_a_prompt_of_all_layers_may_be_trained_further_from_any_of_them(stored, tmp_path):
    options = {"from_layer": stored} if stored else {}
    first = build(facts=DEEP, init_text="ab", **options)
    keys, values = numbers(shape=(4, 5, 2, 4))
    first.begin_from(keys, values)
    save_prompt(tmp_path, first.plain(), {"options": options})
    given = {"facts": DEEP, "init": "file", "init_file": str(tmp_path)}
    assert torch.equal(build(**given)().keys, keys)
    found = build(**given, from_layer=2)()
    assert torch.equal(found.keys, keys[2:]) and torch.equal(found.lower_values, values[:2])
    found = build(**given, from_layer=1, lower_layers="none")()
    assert torch.equal(found.values, values[1:]) and found.lower_keys is None


def test_a_prompt_of_a_version_without_frozen_positions_is_read():
    keys, values = numbers()
    prompt = build(init="random", with_start=False)
    prompt.load_state_dict(prompt.take({"prefix_keys": keys, "prefix_values": values}))
    assert torch.equal(prompt().keys, keys)


def test_random_numbers_depend_on_the_seed_alone_and_are_pefts_where_there_is_an_mlp():
    first = build(init="random")
    torch.manual_seed(99)
    assert torch.equal(build(init="random")().keys, first().keys)
    mlp = build(init="random", reparameterization="mlp")
    assert torch.equal(build(init="random", reparameterization="mlp")().keys, mlp().keys)
    assert mlp().keys.abs().max() > 0 and not build(init="zero", reparameterization="mlp")().keys.any()


def test_the_mlp_has_pefts_parameters():
    from peft import PrefixEncoder, PrefixTuningConfig

    options = {"num_virtual_tokens": 5, "token_dim": 8, "num_layers": 3, "encoder_hidden_size": 6}
    theirs = PrefixEncoder(PrefixTuningConfig(prefix_projection=True, num_attention_heads=2, **options))
    ours = build(init="random", reparameterization="mlp", encoder_hidden_size=6)
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    assert shapes == {name: p.shape for name, p in theirs.named_parameters()}
    theirs.load_state_dict({name: p.detach() for name, p in ours.named_parameters()})
    packed = PrefixTuning.to_peft(ours.plain()).prompt_embeddings
    torch.testing.assert_close(packed, theirs(torch.arange(5)).detach())


@pytest.mark.parametrize("to", ["peft", "cartridge"])
def test_an_adapter_is_read_as_it_was_written(to, tmp_path):
    from peft import PeftConfig

    prompt = build(init_text="ab")
    prompt.begin_from(*numbers())
    stored = {name: tensor.detach() for name, tensor in prompt.state_dict().items()} | prompt.plain()
    base = {"path": "/base", "family": "causal", "num_layers": 3, "num_attention_heads": 4}
    facts = {"method": "prefix_tuning", "num_virtual_tokens": 5, "width": 16, "placement": "prefix", "base": base}
    check_for_peft(stored, facts, to)
    export_peft(stored, facts, "CAUSAL_LM", tmp_path, to=to)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.peft_type == ("CARTRIDGE" if to == "cartridge" else "PREFIX_TUNING")
    assert (config.token_dim, config.num_attention_heads, config.num_virtual_tokens) == (8, 2, 5)
    assert getattr(config, "num_frozen_tokens", 1) == 1
    assert "prefix_projection" in json.loads((tmp_path / "adapter_config.json").read_text()) or to == "cartridge"
    again = build(init="file", init_file=str(tmp_path))
    assert again.num_frozen == (to == "cartridge")  # PEFT's other type has no such number
    assert torch.equal(again().keys, numbers()[0]) and torch.equal(again().values, numbers()[1])
    other = BaseFacts(width=16, num_layers=2, num_key_value_heads=3, head_width=4)
    for given in ({"facts": other}, {"num": 4}):
        message = error_of(init="file", init_file=str(tmp_path), **given)
        assert "is of another shape (" in message and "(5, 48)" in message
    assert "num_layers 3, num_attention_heads 2" in error_of(init="file", init_file=str(tmp_path), facts=other)


def test_adapters_of_other_methods_and_files_without_keys_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "is a PEFT adapter of type LORA" in error_of(init="file", init_file=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "CARTRIDGE"}))
    assert "holds no prompt_embeddings" in error_of(init="file", init_file=str(tmp_path))
    (tmp_path / "apart").mkdir()
    save_file({"virtual_tokens": torch.zeros(5, 16)}, tmp_path / "apart" / "vectors.safetensors")
    assert "holds no prefix_keys" in error_of(init="file", init_file=str(tmp_path / "apart" / "vectors.safetensors"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_frozen": 5}, "prompt.num_frozen: 5 of prompt.num_virtual_tokens=5 leaves nothing to train"),
        ({"encoder_hidden_size": 8}, "prompt.encoder_hidden_size is for the MLP: set prompt.reparameterization=mlp"),
        ({"init": "zero", "init_rows": 2}, "prompt.init_rows is given but prompt.init is zero: set prompt.init=rows"),
        ({"init": "rows", "init_rows": 9}, "prompt.init_rows is 9 but there are 3 training rows"),
        ({"init": "vocab"}, "prompt.init: vocab is not for prefix_tuning"),
        ({"reparameterization": "lstm"}, "prompt.reparameterization"),
        ({"num_frozen": -1}, "prompt.num_frozen"),
        ({"train_keys": 1}, "prompt.train_keys"),
        ({"facts": BaseFacts(16, 3, None, 4)}, "needs a base whose layers can be given keys and values"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(given, says):
    assert says in error_of(**given)


def test_keys_of_another_shape_than_the_bases_are_refused():
    prompt = build(init_text="ab")
    with pytest.raises(ValueError, match=r"prefix_tuning has keys \[\(5, 2, 4\)\], the base computes \[\(5, 2, 6\)\]"):
        prompt.begin_from(*numbers(shape=(3, 5, 2, 6)))


def test_only_keys_and_values_are_exported_as_a_cartridge():
    facts = {"method": "prompt_tuning", "placement": "prefix"}
    with pytest.raises(UserError, match="--to cartridge: a cartridge is keys and values, and this is prompt_tuning"):
        check_for_peft({"virtual_tokens": torch.zeros(2, 4)}, facts, "cartridge")
    facts = {"method": "prefix_tuning", "placement": "infix"}
    with pytest.raises(UserError, match="--to peft: PEFT has no placement infix$"):
        check_for_peft({"prefix_keys": torch.zeros(2, 4), "prefix_values": torch.zeros(2, 4)}, facts)


@pytest.mark.parametrize("options", [{}, {"num_frozen": 2}, {"reparameterization": "mlp", "init": "random"}])
def test_values_may_have_another_width_than_keys_but_not_for_peft(options, tmp_path):
    facts = BaseFacts(width=16, num_layers=3, num_key_value_heads=2, head_width=4, value_width=6)
    prompt = build(facts=facts, **{"init": "random"} | options)
    found = prompt()
    assert (found.keys.shape, found.values.shape) == (SHAPE, (3, 5, 2, 6))
    found.values.sum().backward()
    assert all(p.grad is not None for name, p in prompt.named_parameters() if name != "prefix_keys")
    save_prompt(tmp_path / "run", prompt.plain(), {})
    further = build(facts=facts, init="file", init_file=str(tmp_path / "run"))
    assert torch.equal(further().values, found.values)
    with pytest.raises(UserError, match="--to peft: PEFT has no keys and values of unequal width"):
        check_for_peft(prompt.plain(), {"method": "prefix_tuning", "placement": "prefix"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "CARTRIDGE"}))
    save_file({"prompt_embeddings": torch.zeros(5, 60)}, tmp_path / "adapter_model.safetensors")
    assert "no keys and values of unequal width" in error_of(facts=facts, init="file", init_file=str(tmp_path))


HEADS = ((2, 4, 4), (0, 0, 0), (1, 6, 6), (1, 6, 6))  # of each layer; the second one has no attention
DIFFERING = BaseFacts(width=16, num_layers=4, layer_heads=HEADS, num_first_layers=4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_frozen": 2},
        {"reparameterization": "mlp"},
        {"from_layer": 1},
        {"from_layer": 2},  # the layers from there on are alike
        {"from_layer": 2, "lower_layers": "none", "num_frozen": 0},
    ],
)
def test_layers_may_differ_in_their_heads(options, tmp_path):
    prompt = build(facts=DIFFERING, init_text="ab", **options)
    draw = torch.Generator().manual_seed(0)
    computed = [torch.randn(5, heads, width, generator=draw) for heads, width, _ in HEADS if heads]
    computed += [torch.randn(5, heads, width, generator=draw) for heads, _, width in HEADS if heads]
    prompt.begin_from(*computed)
    first = options.get("from_layer", 0)
    found = prompt()
    lower = [] if found.lower_keys is None else [*found.lower_keys]
    shown = [part for part in [*lower, *found.keys] if part.shape[1]]
    assert len(found.keys) == 4 - first and len(lower) == (0 if options.get("lower_layers") else first)
    assert all(torch.equal(part, whole) for part, whole in zip(reversed(shown), reversed(computed[:3]), strict=False))
    assert torch.equal(found.values[-1], computed[-1])
    (found.values[-1].sum() + found.keys[-1].sum()).backward()
    save_prompt(tmp_path, prompt.plain(), {"options": options})
    again = build(facts=DIFFERING, init="file", init_file=str(tmp_path), **options)
    assert all(torch.equal(tensor, again.plain()[name]) for name, tensor in prompt.plain().items())
    facts = {"method": "prefix_tuning", "placement": "prefix", "base": {"num_layers": 4}, "options": options}
    with pytest.raises(UserError, match="--to peft: PEFT"):
        check_for_peft(prompt.plain(), facts)
    fewer = BaseFacts(width=16, num_layers=4, layer_heads=HEADS[::-1], num_first_layers=4)
    with pytest.raises(ValueError, match="prefix_tuning has keys"):
        build(facts=fewer, init_text="ab", **options).begin_from(*computed)
