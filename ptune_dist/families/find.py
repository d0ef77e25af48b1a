"""The kinds of base: what each is loaded as, where a prompt enters it, and how it answers.

causal: a decoder reads [virtual tokens, input, target]. seq2seq: the encoder reads [virtual tokens, input], the decoder
writes the target. encoder: a classifier reads [virtual tokens, input]; its head is new, is trained with the prompt and
is stored with it.
"""

import inspect

import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ptune_dist.errors import UserError

# What transformers loads each family as, the architectures that have it, and how its models are called in messages.
AUTO_CLASS = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "encoder": AutoModelForSequenceClassification,
}
ARCHITECTURES = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "encoder": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
POOLER = ".pooler."


def find_family(shape: transformers.PretrainedConfig, asked: str, path: str) -> str:
    """The family that `model.family` asks for, or the architecture's own for `auto`. Raises UserError."""
    kind = shape.model_type
    found = asked if asked != "auto" else own_family(shape)
    if found is None or kind not in ARCHITECTURES[found]:
        known = "decoder-only language model (causal), an encoder-decoder (seq2seq) or a text encoder (encoder)"
        wanted = f"a {known}" if found is None else f"an architecture with model.family={found}"
        raise UserError(f"model.path: {path} is a {kind} model: {wanted} is needed")
    is_decoder_only = not shape.is_encoder_decoder and not is_encoder(shape)
    if (found == "causal") != is_decoder_only or (found == "seq2seq") != shape.is_encoder_decoder:
        raise UserError(f"model.family: {path} is a {kind} model, which is {own_family(shape)}, not {found}")
    return found


def own_family(shape: transformers.PretrainedConfig) -> str | None:
    if shape.is_encoder_decoder:
        return "seq2seq"
    if is_encoder(shape):
        return "encoder"
    return "causal" if shape.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def is_encoder(shape: transformers.PretrainedConfig) -> bool:
    return shape.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(shape, "is_decoder", False)


def check_decoder_start(model: PreTrainedModel, family: str, path: str) -> None:
    """Raise UserError for a seq2seq base that does not say which token its decoder starts from."""
    if family == "seq2seq" and getattr(model.config, "decoder_start_token_id", None) is None:
        raise UserError(f"model.path: {path}/config.json names no decoder_start_token_id: set it there")


def check_takes_vectors(model: PreTrainedModel, family: str, path: str) -> None:
    """Raise UserError for a model that cannot be given input vectors in place of tokens."""
    function = model.prepare_inputs_for_generation if family == "causal" else model.forward
    if "inputs_embeds" not in inspect.signature(function).parameters:
        kind = model.config.model_type
        raise UserError(f"model.path: {path}: transformers' {kind} models cannot go on from input vectors")


def is_outside(model: PreTrainedModel, name: str) -> bool:
    """Whether a classifier's parameter stands outside of its encoder: DeBERTa's pooler does, BERT's does not."""
    return not name.startswith(f"{model.base_model_prefix}.")


def may_start_anew(model: PreTrainedModel, name: str, family: str) -> bool:
    """An encoder's head, or its pooler, which masked language models lack."""
    return family == "encoder" and (is_outside(model, name) or POOLER in name)
