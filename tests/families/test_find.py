"""Every base is loaded as what it is, and asking for what it is not is refused in one line."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    ViTConfig,
    XLNetConfig,
)

from ptune_dist.base.load import fill_whole
from ptune_dist.families import FAMILIES
from ptune_dist.families.find import find_family
from tests.base.bases import error_of, family_of, open_only
from tests.conftest import ARCHITECTURES, ENCODERS, LABELS, SEQ2SEQ, tiny_shape

KINDS = ARCHITECTURES + SEQ2SEQ + ENCODERS


@pytest.mark.parametrize("kind", KINDS)
def test_auto_finds_the_family_of_an_architecture(kind):
    shape = AutoConfig.for_model(kind, **tiny_shape(kind))
    assert find_family(shape, "auto", "p").name == find_family(shape, family_of(kind), "p").name == family_of(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_a_base_is_not_is_refused_by_both_names(kind, family):
    if family == family_of(kind):
        return
    shape = AutoConfig.for_model(kind, **tiny_shape(kind))
    message = error_of(find_family, shape, family, "p", starts="model.")
    assert f"is a {kind} model" in message and family in message


def test_a_bert_that_decodes_is_causal():
    assert find_family(BertConfig(is_decoder=True), "auto", "p").name == "causal"


def test_what_is_no_language_model_is_refused_by_its_kind():
    assert "is a vit model" in error_of(find_family, ViTConfig(), "auto", "p")


def test_a_base_that_cannot_go_on_from_input_vectors_is_refused(tmp_path):
    XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, vocab_size=20).save_pretrained(tmp_path)
    assert "xlnet models cannot continue from input vectors" in error_of(open_only, tmp_path, random_init=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_becomes_the_model_of_its_family(tiny_bases, kind):
    opened = open_only(tiny_bases[kind], labels=LABELS)
    wanted = {"causal": "CausalLM", "seq2seq": "ConditionalGeneration", "encoder": "SequenceClassification"}
    name = type(opened.model).__name__.replace("LMHeadModel", "ForCausalLM")
    assert opened.family.name == family_of(kind) and name.endswith(wanted[opened.family.name])


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_tells_apart_the_labels_that_it_is_given(tiny_bases, kind):
    model = open_only(tiny_bases[kind], labels=LABELS).model
    assert model.config.num_labels == 3 and list(model.config.id2label.values()) == LABELS
    heads = [
        p for name, p in model.named_parameters() if FAMILIES["encoder"].may_start_anew(model, name) and p.shape[0] == 3
    ]
    assert len(heads) == 2  # the last layer's weight and bias


def test_only_an_encoders_head_and_its_pooler_may_start_anew(tiny_bases):
    model = open_only(tiny_bases["bert"], labels=LABELS).model
    names = [name for name, _ in model.named_parameters()]
    anew = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert {name for name in names if FAMILIES["encoder"].may_start_anew(model, name)} == anew
    others = [FAMILIES["causal"], FAMILIES["seq2seq"]]
    assert not any(family.may_start_anew(model, name) for name in names for family in others)


def test_a_decoder_must_know_what_it_starts_from(tmp_path):
    T5Config(d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=32).save_pretrained(tmp_path)
    assert "decoder_start_token_id" in error_of(open_only, tmp_path, random_init=True)


class OwnLlamaConfig(LlamaConfig):
    model_type = "own_llama"


class OwnLlama(LlamaForCausalLM):
    """A user's own class, with something of its own in the forward pass."""

    config_class = OwnLlamaConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2.0 * out.logits
        return out


class OwnBertConfig(BertConfig):
    model_type = "own_bert"


class OwnBertForMaskedLM(BertForMaskedLM):
    config_class = OwnBertConfig


class OwnBert(BertForSequenceClassification):
    config_class = OwnBertConfig


@pytest.fixture(scope="module")
def own_bases(tmp_path_factory):
    """Folders of bases whose classes a user has derived from transformers' and registered with its Auto classes."""
    AutoConfig.register("own_llama", OwnLlamaConfig)
    AutoModelForCausalLM.register(OwnLlamaConfig, OwnLlama)
    AutoConfig.register("own_bert", OwnBertConfig)
    AutoModelForMaskedLM.register(OwnBertConfig, OwnBertForMaskedLM)
    AutoModelForSequenceClassification.register(OwnBertConfig, OwnBert)
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    OwnLlama(OwnLlamaConfig(**tiny_shape("llama"))).save_pretrained(folder / "llama")
    OwnBertForMaskedLM(OwnBertConfig(**tiny_shape("bert"))).save_pretrained(folder / "bert")
    return folder


def test_a_users_own_class_is_loaded_as_it_is(own_bases):
    found = fill_whole(open_only(own_bases / "llama"))
    assert type(found) is OwnLlama
    ids = torch.arange(5, 11)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(own_bases / "llama", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(found(ids).logits, wanted)
    assert open_only(own_bases / "llama").family.name == "causal"
    opened = open_only(own_bases / "bert", labels=LABELS)
    assert opened.family.name == "encoder" and type(opened.model) is OwnBert and "classifier.weight" in opened.trained
