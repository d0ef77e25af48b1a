"""Errors in `model.path` are reported in one line, and bases have different fingerprints."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from ptune_dist.base.source import fingerprint_base, largest_id, load_shape, load_tokenizer
from tests.base.bases import QUERY, error_of, open_only, rewrite_shape, rewrite_weights
from tests.processes import process_env


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
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base", "peft_type": "P_TUNING"}'},
            "is a PEFT prompt (P_TUNING) of org/base: give that base, and the prompt as prompt.init_file",
        ),
        ({"model-Q4_K_M.gguf": "GGUF"}, "ptune-dist import-base"),
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
        ({"modules.json": "[]"}, "layout of sentence-transformers"),
        ({"inner/config.json": "{}"}, "give the folder that contains it, such as "),
        ({"config.json/of/a": ""}, "a config.json that is not a file"),
        ({"config.json": "version https://git-lfs.github.com/spec/v1"}, "git-lfs pointer instead of config.json"),
        ({"config.json": "{}", "model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
    ],
)
def test_a_folder_that_is_something_else_is_told_what_it_is(tmp_path, files, expected):
    place = tmp_path / "given"
    place.mkdir()
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_text(content)
    message = error_of(load_shape, str(place))
    assert message.startswith(f"model.path: {place} ") and expected in message


@pytest.mark.parametrize("name", ["a.gguf", "pytorch_model.bin", "a-1-py3-none-any.whl"])
def test_a_file_is_told_how_to_convert_it(tmp_path, name):
    (tmp_path / name).write_text("GGUF")
    assert f"ptune-dist import-base {tmp_path / name} --out " in error_of(load_shape, str(tmp_path / name))


# Bases without weights that are read


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}'}, "is a PEFT adapter of org/base"),
        ({"base-Q4.gguf": "GGUF"}, "holds GGUF files: convert one with"),
        ({"pytorch_model.bin": "x"}, "has pickled weights, which are not read: convert them with"),
        ({"pytorch_model-00001-of-00002.bin": "x"}, "has pickled weights"),
        (
            {"pytorch_model.bin": "version https://git-lfs.github.com/spec/v1"},
            "git-lfs pointer instead of pytorch_model.bin",
        ),
        ({"consolidated.00.pth": "x"}, "layout of its publisher"),
        ({"base.pt": "x"}, "pickled weights (.pt)"),
        ({"tf_model.h5": "x"}, "TensorFlow weights"),
        ({"flax_model.msgpack": "x"}, "Flax weights"),
        ({"weights.npz": "x"}, "MLX or NumPy weights"),
        ({"onnx/model.onnx": "x"}, "ONNX weights"),
        ({"openvino_model.xml": "x"}, "OpenVINO weights"),
        ({"model-00001-of-00002.safetensors": "x"}, "without model.safetensors.index.json"),
        ({"model.fp16.safetensors": "x"}, "name the file model.safetensors"),
        ({"model.safetensors.incomplete": "x"}, "a download that was interrupted"),
        ({}, "it has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_base_without_weights_in_safetensors_is_told_what_it_has(base, files, expected):
    (base / "model.safetensors").unlink()
    for name, content in files.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(content)
    message = error_of(open_only, base)
    assert str(base) in message and expected in message


def test_a_link_to_no_file_is_named(base):
    for name, read in (("model.safetensors", open_only), ("config.json", load_shape)):
        (base / name).unlink()
        (base / name).symlink_to(base / "nothing")
        assert name in error_of(read, str(base))


def test_weights_that_mlx_quantized_are_named(base):
    def quantize(tensors):
        shape = tensors[QUERY].shape
        tensors[QUERY] = torch.zeros(shape[0], shape[1] // 8, dtype=torch.uint32)
        tensors[QUERY.replace("weight", "scales")] = torch.ones(shape[0], 1)

    rewrite_weights(base, quantize)
    assert f"{QUERY} is quantized by MLX" in error_of(open_only, base)


# Code and tokenizers that are not read


def test_code_of_a_bases_own_is_not_run_and_nobody_is_asked(base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the terminal was asked"))
    for name in ("configuration_own.py", "tokenization_own.py"):
        (base / name).write_text("raise AssertionError('it was run')")
    rewrite_shape(base, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert load_shape(str(base)).model_type == "llama"  # transformers has a class: its own is not needed
    rewrite_shape(base, model_type="own", auto_map={"AutoConfig": "configuration_own.Own"})
    assert "the architecture of" in error_of(load_shape, str(base))


def test_a_tokenizer_in_code_of_its_own_is_not_run(base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the terminal was asked"))
    shape = load_shape(str(base))
    (base / "tokenization_own.py").write_text("raise AssertionError('it was run')")
    (base / "tokenizer.json").unlink()
    content = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(content))
    assert "is code of its own (auto_map), which is not run" in error_of(load_tokenizer, str(base), shape)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentencepiece_model_alone_names_the_package_that_reads_it(base, name, monkeypatch):
    (base / "tokenizer.json").rename(base / name)
    monkeypatch.setattr("ptune_dist.base.other_folders.is_installed", lambda module: False)
    assert f"its {name} needs a package" in error_of(load_tokenizer, str(base), load_shape(str(base)))


@pytest.mark.parametrize("name", ["tekken.json", "tiktoken.model"])
def test_other_tokenizers_ask_for_a_tokenizer_json(base, name):
    (base / "tokenizer.json").rename(base / name)
    assert f"only {name}" in error_of(load_tokenizer, str(base), load_shape(str(base)))


def test_no_tokenizer_is_named_with_the_file_to_put_there(base):
    (base / "tokenizer.json").unlink()
    assert f"no tokenizer.json in {base}" in error_of(load_tokenizer, str(base), load_shape(str(base)))


def test_a_message_that_continues_after_a_colon_is_whole(base):
    rewrite_shape(base, num_attention_heads=5)
    assert "multiple of the number of attention heads" in error_of(load_shape, str(base))


def test_an_empty_path_is_named():
    assert error_of(load_shape, "").startswith("model.path: is empty")


# Commits of the hub


PINNED = """
import sys
from ptune_dist.base.source import fingerprint_base, load_shape, load_tokenizer
from ptune_dist.base.weight_files import find_weight_files
for name in sys.argv[1:]:
    shape = load_shape(name)
    load_tokenizer(name, shape)
    (file,) = find_weight_files(name, True)
    print(fingerprint_base(name, random_init=False, seed=0), file.parent.name)
"""


def test_a_commit_of_the_hub_is_the_one_that_is_read(llama, tmp_path):
    """Two commits of one base in the hub's cache, whose weights differ."""
    first, second = "a" * 40, "b" * 40
    stored = tmp_path / "hub" / "models--user--base"
    for commit in (first, second):
        shutil.copytree(llama, stored / "snapshots" / commit)
    rewrite_weights(stored / "snapshots" / second, add_to_query(1.0))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(second)
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PINNED, "user/base", f"user/base@{first}", f"user/base@{second}"]
    done = subprocess.run(command, env=process_env(env), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [commit for _, commit in found] == [second, first, second]
    assert found[0] == found[2] and found[0][0] != found[1][0]
