"""What can be wrong with `model.path` is said in one line, and one base is told from another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from ptune_dist.base.load import fingerprint_base, load_base, load_shape, load_tokenizer
from ptune_dist.errors import UserError
from tests.conftest import TINY, build_tiny_base

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return build_tiny_base("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def base(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "base"))


def load(path, **options):
    return load_base(str(path), **{"dtype": torch.float32, "random_init": False, "seed": 0} | options)


def fingerprint(path, **options) -> str:
    return fingerprint_base(str(path), **{"random_init": False, "seed": 0} | options)


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.startswith("model.path: ") and "\n" not in message
    return message


def rewrite_weights(base: Path, change) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})


def rewrite_shape(base: Path, **changes) -> None:
    content = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(content))


def add_to_query(amount: float):
    def change(tensors):
        tensors[QUERY][0, 0] += amount

    return change


# What is loaded


def test_a_base_is_frozen_in_eval_mode_and_holds_the_files_weights(base):
    loaded = load(base)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    stored, found = load_file(base / "model.safetensors"), loaded.state_dict()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_the_dtype_is_the_configs_whatever_the_file_holds(base):
    assert {p.dtype for p in load(base, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(TINY / "causal").parameters()} == {torch.float32}


def test_a_random_base_needs_no_weights_and_follows_the_seed_alone(base):
    (base / "model.safetensors").unlink()
    first = load(base, random_init=True, seed=3).state_dict()
    torch.randn(3)
    again, other = load(base, random_init=True, seed=3).state_dict(), load(base, random_init=True, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[QUERY], other[QUERY])


def test_building_a_random_base_leaves_torchs_generator_alone(base):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    load(base, random_init=True)
    assert torch.equal(torch.rand(3), wanted)


# One base and another


def test_the_fingerprint_is_the_same_for_a_copy_and_for_a_second_look(original, base):
    assert fingerprint(base) == fingerprint(original) == fingerprint(original)


def test_the_fingerprint_changes_with_a_weight_and_with_the_shape(base):
    before = fingerprint(base)
    rewrite_weights(base, add_to_query(1e-3))
    weight_changed = fingerprint(base)
    rewrite_shape(base, rms_norm_eps=1e-3)
    assert len({before, weight_changed, fingerprint(base)}) == 3


def test_the_fingerprint_of_a_random_base_is_its_shapes_and_its_seeds(base):
    first = fingerprint(base, random_init=True)
    rewrite_weights(base, add_to_query(1.0))
    assert fingerprint(base, random_init=True) == first
    assert len({first, fingerprint(base), fingerprint(base, random_init=True, seed=1)}) == 3
    rewrite_shape(base, rms_norm_eps=1e-3)
    assert fingerprint(base, random_init=True) != first


def test_the_fingerprint_does_not_change_with_the_version_of_transformers(base, monkeypatch):
    before = fingerprint(base)
    monkeypatch.setattr("transformers.configuration_utils.__version__", "5.99.0")
    assert fingerprint(base) == before


# What is refused


def test_weights_that_miss_a_tensor_are_refused_by_its_name(base):
    rewrite_weights(base, lambda tensors: tensors.pop(QUERY))
    assert QUERY in error_of(load, base)


def test_weights_of_another_shape_are_refused_by_the_tensors_name(base):
    rewrite_weights(base, lambda tensors: tensors.update({QUERY: tensors[QUERY][:10]}))
    assert QUERY in error_of(load, base)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_truncated_weights_are_refused(base, size):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "weights" in error_of(load, base) and str(base) in error_of(load, base)


def test_a_folder_without_weights_and_one_without_a_shard_are_refused(base, tmp_path):
    load(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    second = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    second.unlink()
    assert second.name in error_of(load, tmp_path / "shards")
    (base / "model.safetensors").unlink()
    assert "model.safetensors" in error_of(load, base)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model_type": "zork"}', '{"model_type": "llama", "hidden_size": "big"}',
                '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}'],
)  # fmt: skip
def test_a_config_json_that_describes_no_model_is_refused(base, content):
    (base / "config.json").write_text(content)
    assert str(base) in error_of(load_shape, str(base))


@pytest.mark.parametrize(
    "kind, config",
    [("bert", BertConfig(hidden_size=32, num_attention_heads=2)), ("t5", T5Config(d_model=32, num_layers=1))],
)
def test_encoders_and_encoder_decoders_are_refused_by_their_kind(tmp_path, kind, config):
    config.save_pretrained(tmp_path)
    assert f"is a {kind} model" in error_of(load, tmp_path)


def test_a_path_that_is_no_folder_is_named_with_the_nearest_one(base, tmp_path):
    assert f"did you mean {tmp_path}/base?" in error_of(load_shape, str(tmp_path / "bse"))
    assert f"no folder {tmp_path}/else" in error_of(load_shape, str(tmp_path / "else"))
    assert "is a file" in error_of(load_shape, str(base / "config.json"))
    assert "config.json" in error_of(load_shape, str(tmp_path))  # a folder, but of no model


def test_a_tokenizer_with_more_tokens_than_the_base_embeds_is_refused(base):
    shape = load_shape(str(base))
    load_tokenizer(str(base), shape)
    rewrite_shape(base, vocab_size=200)
    message = error_of(load_tokenizer, str(base), load_shape(str(base)))
    assert "token id 257" in message and "200" in message


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(base):
    content = json.loads((base / "tokenizer_config.json").read_text())
    del content["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(content))
    assert "eos_token" in error_of(load_tokenizer, str(base), load_shape(str(base)))


@pytest.mark.parametrize("content", [None, "{", "{}", '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_missing_or_damaged_tokenizer_is_refused(base, content):
    file = base / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    assert "tokenizer" in error_of(load_tokenizer, str(base), load_shape(str(base)))
