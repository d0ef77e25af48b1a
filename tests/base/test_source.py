"""Errors in `model.path` are reported in one line, and bases have different fingerprints."""

import json

import pytest

from ptune_dist.base.source import fingerprint_base, largest_id, load_shape, load_tokenizer
from tests.base.bases import QUERY, error_of, rewrite_shape, rewrite_weights


def fingerprint(path, **options) -> str:
    return fingerprint_base(str(path), **{"random_init": False, "seed": 0} | options)


def add_to_query(amount: float):
    def change(tensors):
        tensors[QUERY][0, 0] += amount

    return change


# Fingerprints


def test_the_fingerprint_is_the_same_for_a_copy_and_for_a_second_look(llama, base):
    assert fingerprint(base) == fingerprint(llama) == fingerprint(llama)


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


# Errors


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model_type": "zork"}',
        '{"model_type": "llama", "hidden_size": "big"}',
        '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}',
    ],
)
def test_a_config_json_that_describes_no_model_is_refused(base, content):
    (base / "config.json").write_text(content)
    assert str(base) in error_of(load_shape, str(base))


def test_a_path_that_is_no_folder_is_named_with_the_nearest_one(base, tmp_path):
    assert f"did you mean {tmp_path}/base?" in error_of(load_shape, str(tmp_path / "bse"))
    assert f"no folder {tmp_path}/else" in error_of(load_shape, str(tmp_path / "else"))
    assert "is a file" in error_of(load_shape, str(base / "config.json"))
    assert "config.json" in error_of(load_shape, str(tmp_path))  # a folder without a model


def test_a_tokenizer_may_have_more_tokens_than_the_base_embeds_but_pads_with_one_that_it_has(base):
    shape = load_shape(str(base))
    assert load_tokenizer(str(base), shape).pad_token_id == 1
    rewrite_shape(base, vocab_size=200)
    assert largest_id(load_tokenizer(str(base), load_shape(str(base)))) == 257
    rewrite_shape(base, vocab_size=1)
    assert load_tokenizer(str(base), load_shape(str(base))).pad_token_id == 0


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused_unless_none_is_needed(base):
    content = json.loads((base / "tokenizer_config.json").read_text())
    del content["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(content))
    shape = load_shape(str(base))
    assert "eos_token" in error_of(load_tokenizer, str(base), shape)
    assert load_tokenizer(str(base), shape, with_eos=False).eos_token_id is None  # an encoder's, for example


@pytest.mark.parametrize("content", [None, "{", "{}", '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_missing_or_damaged_tokenizer_is_refused(base, content):
    file = base / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    assert "tokenizer" in error_of(load_tokenizer, str(base), load_shape(str(base)))


# Folders that are something else


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, "is a PEFT adapter of org/base"),
        ({"model-Q4_K_M.gguf": "GGUF"}, "gguf_file"),
        ({}, "is an empty folder"),
        ({"config.yaml": "", "status.json": "{}"}, "is a run of ptune-dist"),
        ({"latest": "global_step5"}, "is a checkpoint of DeepSpeed"),
        ({"checkpoint-5/config.json": "{}"}, "checkpoint-5"),
        ({"model_index.json": "{}"}, "diffusers"),
        ({"weights.incomplete": ""}, "interrupted"),
        ({"params.json": "{}", "consolidated.safetensors": ""}, "layout of its publisher"),
        ({"model.onnx": ""}, "ONNX"),
        ({"base.zip": ""}, "archive"),
        ({"tokenizer.json": "{}"}, "a tokenizer only"),
        ({"notes.txt": ""}, "has no config.json"),
        ({"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
    ],
)
def test_a_folder_that_is_something_else_is_told_what_it_is(tmp_path, files, expected):
    place = tmp_path / "given"
    place.mkdir()
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content)
    message = error_of(load_shape, str(place))
    assert message.startswith(f"model.path: {place} ") and expected in message


def test_a_gguf_file_is_told_how_to_convert_it(tmp_path):
    (tmp_path / "a.gguf").write_text("GGUF")
    assert "gguf_file" in error_of(load_shape, str(tmp_path / "a.gguf"))
