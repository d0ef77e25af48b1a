"""For any names and dtypes in a checkpoint, the base equals what transformers loads, or the problem is named."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, MixtralConfig, MixtralForCausalLM

from ptune_dist.base.load import fill_whole
from ptune_dist.families import FAMILIES
from tests.base.bases import (
    QUERY,
    drop,
    error_of,
    family_of,
    inputs_of,
    load,
    logits_of,
    open_only,
    rewrite_shape,
    rewrite_weights,
)
from tests.conftest import ARCHITECTURES, ENCODERS, LABELS, SEQ2SEQ

KINDS = ARCHITECTURES + SEQ2SEQ + ENCODERS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
TIED = ["gpt2", "qwen2", "opt", "bloom", "t5", "bart"]


@pytest.fixture
def copy_of(tiny_bases, tmp_path):
    """A copy of a tiny base to damage."""
    return lambda kind: Path(shutil.copytree(tiny_bases[kind], tmp_path / kind))


def with_transformers(folder: Path, kind: str, dtype: torch.dtype, **options):
    return FAMILIES[family_of(kind)].auto_class.from_pretrained(folder, dtype=dtype, **options).eval()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


# What is loaded


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_bitwise_what_transformers_loads_from_files_of_any_dtype_into_any(tiny_bases, tmp_path, kind, stored):
    head = {"num_labels": len(LABELS)} if kind in ENCODERS else {}  # saved with its new head
    with_transformers(tiny_bases[kind], kind, stored, **head).save_pretrained(tmp_path)
    for dtype in DTYPES:
        ours = load(tmp_path, dtype=dtype, labels=LABELS)
        theirs = with_transformers(tmp_path, kind, dtype)
        if kind == "t5":
            theirs.to(dtype)  # transformers keeps one float16 layer in float32, which no engine would
        for parameter in ours.parameters():
            parameter.data = parameter.to(dtype)  # an encoder's head, which is trained in float32
        assert_same(ours.state_dict(), theirs.state_dict())
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()))
        assert torch.equal(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoders_new_head_is_trained_in_float32_and_the_rest_is_what_transformers_loads(tiny_bases, kind):
    opened = open_only(tiny_bases[kind], dtype=torch.bfloat16, labels=LABELS, seed=3)
    theirs = with_transformers(tiny_bases[kind], kind, torch.bfloat16).state_dict()
    ours = fill_whole(opened)
    assert opened.new and opened.trained == {name for name, p in ours.named_parameters() if p.requires_grad}
    for name, tensor in ours.state_dict().items():
        if name in opened.trained:
            assert tensor.dtype == torch.float32 and bool(tensor.any()) == (not name.endswith("bias"))
        else:
            assert torch.equal(tensor, theirs[name])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_neox"])  # which transformers loads
def test_every_stored_byte_of_a_base_is_read_once(tiny_bases, kind):
    opened = open_only(tiny_bases[kind])
    fill_whole(opened)
    stored = load_file(tiny_bases[kind] / "model.safetensors")
    heads = [name for name in stored if name.startswith(("cls.", "lm_head."))] if kind in ENCODERS else []
    assert opened.weights.bytes_read == sum(t.nbytes for name, t in stored.items() if name not in heads)


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_are_one_parameter(tiny_bases, kind):
    model = load(tiny_bases[kind])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is model.lm_head.weight]
    assert len(names) >= 2 and not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_are_found_by_either_name(copy_of, name):
    base = copy_of("qwen2")
    wanted = logits_of(load(base))
    rewrite_weights(base, lambda tensors: tensors.update({name: tensors.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits_of(load(base)), wanted)


def test_tied_weights_may_be_stored_twice(copy_of):
    base = copy_of("qwen2")
    wanted = logits_of(load(base))
    rewrite_weights(base, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert torch.equal(logits_of(load(base)), wanted)


@pytest.mark.parametrize(
    "kind, prefix, row",
    [
        ("qwen2", "", 0),
        ("qwen2", "", 271),  # the first rows are rare tokens, which may never have been trained
        ("gpt2", "transformer.", 0),
    ],
)
def test_a_head_of_its_own_in_a_base_that_says_tied_is_used(copy_of, kind, prefix, row):
    """As transformers does, which warns. `prefix` is what the names in the file lack."""
    base = copy_of(kind)

    def change(tensors):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        tensors["lm_head.weight"] = next(t for name, t in tensors.items() if name.endswith(EMBEDDINGS)).clone()
        tensors["lm_head.weight"][row] += 1
        return tensors

    rewrite_weights(base, change)
    model = load(base)
    stored = load_file(base / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    rows_that_differ = (model.lm_head.weight != model.get_input_embeddings().weight).any(dim=1).nonzero().flatten()
    assert rows_that_differ.tolist() == [row]
    assert "lm_head.weight is stored beside" in (open_only(base).note or "")


@pytest.mark.parametrize("kind", TIED + ENCODERS)
def test_a_file_of_the_model_below_the_head_is_loaded(tiny_bases, tmp_path, kind):
    AutoModel.from_pretrained(tiny_bases[kind]).save_pretrained(tmp_path)
    prefixes = ("model.", "transformer.", "bert.", "roberta.", "lm_head.")
    assert not any(name.startswith(prefixes) for name in load_file(tmp_path / "model.safetensors"))
    model, theirs = load(tmp_path, labels=LABELS), load(tiny_bases[kind], labels=LABELS).state_dict()
    ours = {n: t for n, t in model.state_dict().items() if not FAMILIES[family_of(kind)].may_start_anew(model, n)}
    assert ours and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "kind, old",
    [
        ("llama", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("bert", ["bert.embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias"]),
        ("bart", ["model.encoder.version", "final_logits_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.rotary_emb.inv_freq", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
)
def test_what_a_base_computes_for_itself_may_stand_in_older_files(copy_of, kind, old):
    base = copy_of(kind)
    wanted = logits_of(load(base))
    rewrite_weights(base, lambda tensors: {name: torch.zeros(1, 272) for name in old} | tensors)
    assert torch.equal(logits_of(load(base)), wanted)


def test_gpt2_as_its_makers_saved_it_is_loaded(tiny_bases, tmp_path):
    """Without a prefix, and with the causal mask of every layer."""
    base = Path(shutil.copytree(tiny_bases["gpt2"], tmp_path / "gpt2"))
    wanted = logits_of(load(base))

    def rename(tensors):
        masks = {f"h.{i}.attn.bias": torch.ones(128, 128).tril()[None, None] for i in range(2)}
        return {name.removeprefix("transformer."): t for name, t in tensors.items()} | masks

    rewrite_weights(base, rename)
    assert torch.equal(logits_of(load(base)), wanted)


# What needs transformers' own loader


def test_a_base_whose_tensors_transformers_renames_is_read_under_its_new_names(tiny_bases):
    folder = tiny_bases["gpt_neox"]
    assert "embed_out.weight" in load_file(folder / "model.safetensors")  # the model calls it lm_head
    opened = open_only(folder)
    assert "lm_head.weight" in opened.names and opened.note is None
    assert torch.equal(logits_of(fill_whole(opened)), logits_of(with_transformers(folder, "gpt_neox", torch.float32)))
    assert open_only(tiny_bases["llama"]).note is None


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """transformers merges its experts' matrices into one tensor while it loads."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    wide = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape = MixtralConfig(**wide, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_whose_tensors_transformers_joins_is_read_part_by_part(mixtral, dtype):
    opened = open_only(mixtral, dtype=dtype)
    assert len(load_file(mixtral / "model.safetensors")) > len(opened.names) and opened.note is None
    assert torch.equal(logits_of(fill_whole(opened)), logits_of(with_transformers(mixtral, "mixtral", dtype)))


def test_what_such_a_base_lacks_is_named(mixtral, tmp_path):
    base = Path(shutil.copytree(mixtral, tmp_path / "mixtral"))
    rewrite_weights(base, drop(QUERY))
    assert f"1 missing tensors: {QUERY}" in error_of(load, base)


def test_extra_tensors_of_such_a_base_are_named(mixtral, tmp_path):
    base = Path(shutil.copytree(mixtral, tmp_path / "mixtral"))
    rewrite_shape(base, num_hidden_layers=1)
    assert "extra tensors: model.layers.1" in error_of(load, base)


# Errors


def test_missing_tensors_are_counted_and_five_are_named(base):
    rewrite_weights(base, drop(QUERY))
    assert error_of(load, base).endswith(f"do not fit its config.json: 1 missing tensors: {QUERY}")
    rewrite_weights(base, lambda tensors: {name: t for name, t in tensors.items() if "layers.1" not in name})
    message = error_of(load, base)
    assert message.count("model.layers") == 5 and "10 missing tensors: " in message and message.endswith(", ...")


def test_extra_tensors_are_counted_and_five_are_named(base):
    rewrite_shape(base, num_hidden_layers=1)
    message = error_of(load, base)
    assert "9 extra tensors: model.layers.1." in message
    assert message.count("model.layers.1.") == 5 and message.endswith(", ...")


def test_tensors_of_another_shape_are_counted_and_named_with_both_shapes(base):
    rewrite_weights(base, lambda tensors: tensors.update({QUERY: tensors[QUERY][:10]}))
    assert error_of(load, base).endswith(f"1 mis-shaped tensors: {QUERY} [10, 32] for [32, 32]")
    rewrite_shape(base, intermediate_size=65)
    message = error_of(load, base)
    assert "7 mis-shaped tensors: " in message and message.count(" for [") == 5


def test_all_problems_are_reported_together(base):
    def change(tensors):
        tensors["model.more"] = tensors.pop(QUERY)
        tensors["model.norm.weight"] = torch.ones(3)

    rewrite_weights(base, change)
    found = error_of(load, base).partition("config.json: ")[2].split("; ")
    assert [part.split(" tensors: ")[0] for part in found] == ["1 missing", "1 extra", "1 mis-shaped"]


def test_a_head_that_is_neither_stored_nor_tied_is_missing(tiny_bases, tmp_path):
    AutoModel.from_pretrained(tiny_bases["llama"]).save_pretrained(tmp_path)
    assert error_of(load, tmp_path).endswith("1 missing tensors: lm_head.weight")


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoders_body_may_not_start_anew(copy_of, kind):
    base = copy_of(kind)
    name = f"{kind}.encoder.layer.0.output.dense.weight"
    rewrite_weights(base, drop(name))
    assert error_of(load, base).endswith(f"1 missing tensors: {name}")


@pytest.mark.parametrize("below", [False, True])
def test_an_encoders_file_with_more_layers_than_its_config_is_refused(tiny_bases, tmp_path, below):
    auto = AutoModel if below else FAMILIES["encoder"].auto_class
    auto.from_pretrained(tiny_bases["bert"]).save_pretrained(tmp_path)
    rewrite_shape(tmp_path, num_hidden_layers=1)
    assert "16 extra tensors: " in error_of(load, tmp_path)


def test_a_stored_head_for_other_labels_starts_anew(tiny_bases, tmp_path):
    with_transformers(tiny_bases["bert"], "bert", torch.float32, num_labels=5).save_pretrained(tmp_path)
    opened = open_only(tmp_path, labels=LABELS)
    assert set(opened.new) == {"classifier.weight", "classifier.bias"}  # the pooler comes from the files
    model = fill_whole(opened)
    assert model(**inputs_of(model)).logits.shape == (2, 3)


def test_a_base_that_is_stored_in_a_format_that_is_not_read_is_refused(base):
    rewrite_shape(base, quantization_config={"quant_method": "hqq"})
    assert "stored quantized" in error_of(load, base)
