"""A base is frozen, in eval mode, and has the weights of its files in the dtype of the config."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ptune_dist.base.load import fill_whole
from tests.base.bases import IDS, QUERY, error_of, load, logits_of, open_only, rewrite_weights
from tests.conftest import ARCHITECTURES, ENCODERS, LABELS, SEQ2SEQ, TINY

KINDS = ARCHITECTURES + SEQ2SEQ + ENCODERS
PLAIN = {"include": [], "threshold": None}

# What is loaded


def test_a_base_is_frozen_in_eval_mode_and_holds_the_files_weights(base):
    loaded = load(base)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    stored = load_file(base / "model.safetensors")
    found = loaded.state_dict()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_the_dtype_is_the_configs_whatever_the_file_holds(base):
    assert {p.dtype for p in load(base, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(TINY / "causal").parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_shards_are_loaded_as_one_file_is(tiny_bases, tmp_path, kind):
    whole = load(tiny_bases[kind])
    shutil.copy(tiny_bases[kind] / "config.json", tmp_path)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load(tmp_path)), logits_of(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_opening_a_base_reads_no_weight_and_takes_no_memory_for_any(tiny_bases, kind):
    opened = open_only(tiny_bases[kind], labels=LABELS)
    assert all(p.is_meta for p in opened.model.parameters()) and opened.weights.bytes_read == 0
    assert not opened.model.training


def test_a_base_does_not_answer_by_its_folders_generation_settings(base):
    (base / "generation_config.json").write_text('{"do_sample": true, "temperature": 7.0, "num_beams": 3}')
    settings = load(base).generation_config
    assert not settings.do_sample and settings.temperature in (None, 1.0) and settings.num_beams in (None, 1)


@pytest.mark.parametrize("kind", ARCHITECTURES + SEQ2SEQ)
def test_no_part_of_a_base_keeps_keys_and_values_unasked(tiny_bases, kind):
    model = open_only(tiny_bases[kind]).model
    assert not any(module.config.use_cache for module in model.modules() if isinstance(module, PreTrainedModel))


# Random bases


def test_a_random_base_needs_no_weights_and_follows_the_seed_alone(base):
    (base / "model.safetensors").unlink()
    first = load(base, random_init=True, seed=3).state_dict()
    torch.randn(3)
    again = load(base, random_init=True, seed=3).state_dict()
    other = load(base, random_init=True, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[QUERY], other[QUERY])


def test_building_a_random_base_leaves_torchs_generator_alone(base):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    load(base, random_init=True)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_base_of_any_architecture_computes(tiny_bases, kind):
    logits = logits_of(load(tiny_bases[kind], random_init=True, labels=LABELS))
    assert logits.isfinite().all() and logits.std() > 0


def test_a_new_heads_numbers_follow_the_seed(tiny_bases):
    heads = [load(tiny_bases["bert"], seed=seed, labels=LABELS).classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.01 < heads[0].std() < 0.03  # the config's initializer_range is 0.02


# Input vectors without the base


@pytest.mark.parametrize("int8", [None, PLAIN], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)  # BART's embeddings scale
def test_the_vectors_of_some_tokens_are_read_without_the_rest(tiny_bases, kind, dtype, int8):
    opened = open_only(tiny_bases[kind], dtype=dtype, int8=int8, labels=LABELS)
    ids = [7, 1, 271, 7]
    vectors = opened.embed(ids)
    width = vectors.shape[1]
    assert opened.weights.bytes_read in (0, len(ids) * width * 4)  # 0: transformers has loaded it
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, fill_whole(opened).get_input_embeddings()(torch.tensor(ids)).float())


def test_the_vectors_of_int8_embeddings_are_those_of_the_base(tiny_bases):
    opened = open_only(tiny_bases["llama"], int8=PLAIN | {"include": ["embeddings"]})
    vectors = opened.embed(IDS[0].tolist())
    assert torch.equal(vectors, fill_whole(opened).get_input_embeddings()(IDS[0]))


# Errors


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


def test_a_shard_that_lacks_what_the_index_says_is_refused_by_the_tensors_name(base, tmp_path):
    load(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    second = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    tensors = load_file(second)
    name, _ = tensors.popitem()
    save_file(tensors, second)
    assert f"1 missing tensors: {name}" in error_of(load, tmp_path / "shards")


def test_a_vector_where_a_matrix_should_be_is_refused(base):
    rewrite_weights(base, lambda tensors: tensors.update({QUERY: tensors[QUERY].flatten()}))
    assert f"{QUERY} [1024] for [32, 32]" in error_of(load, base)


def test_weights_stored_as_whole_numbers_are_refused(base):
    rewrite_weights(base, lambda tensors: tensors | {QUERY: tensors[QUERY].to(torch.int8)})
    assert f"stores {QUERY} as whole numbers" in error_of(load, base)
