"""The language model of a checkpoint that reads images or sounds too: its shape and its tensors."""

import re
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptune_dist.base.weight_files import WeightFiles

# Text models without a class of their own that has a head, and what they are where all positions are those of text.
SAME_AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
OF_IMAGES = ("mrope_section", "mrope_interleaved")  # in the settings of rotary positions
PARTS = r"^(?:model\.)?(?:language_model|text_model)\."


def text_shape(shape: PretrainedConfig) -> PretrainedConfig:
    """The shape of the language model, where transformers has a class for it alone; else the shape itself."""
    text = getattr(shape, "text_config", None)
    if shape.is_encoder_decoder or not isinstance(text, PretrainedConfig):
        return shape
    kind = SAME_AS.get(text.model_type, text.model_type)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return shape
    if kind != text.model_type:
        text = CONFIG_MAPPING[kind](**of_text_alone(text.to_dict()))
    # The whole model's says whether its head is tied.
    text.tie_word_embeddings = getattr(shape, "tie_word_embeddings", text.tie_word_embeddings)
    quantization = getattr(shape, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = quantization
    return text


def of_text_alone(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what places images: the three positions of a token of text are one and the same."""
    found = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    rotary = found.get("rope_parameters")
    if isinstance(rotary, dict):
        rotary = {name: value for name, value in rotary.items() if name not in OF_IMAGES}
        if rotary.get("rope_type") == "mrope":
            rotary["rope_type"] = "default"
        found["rope_parameters"] = rotary
    return found


def key_mapping(model: PreTrainedModel) -> dict[str, str]:
    """Patterns of stored names -> names in the language model, as `from_pretrained` takes them."""
    inner = model.base_model_prefix
    return {rf"{PARTS}lm_head\.": "lm_head.", rf"{PARTS}(?:{inner}\.)?": f"{inner}."}


def name_in_text(model: PreTrainedModel, stored: str) -> str | None:
    """A stored tensor's name in the language model; None for what belongs to another part."""
    for pattern, name in key_mapping(model).items():
        if re.match(pattern, stored):
            return re.sub(pattern, name, stored, count=1)
    top, _, rest = stored.partition(".")
    children = dict(model.base_model.named_children())
    is_inner = top == model.base_model_prefix and rest.partition(".")[0] in children
    return stored if is_inner or top in dict(model.named_children()) and top != model.base_model_prefix else None


def text_files(files: WeightFiles, model: PreTrainedModel) -> WeightFiles:
    """The files' tensors of the language model; those of the other parts are never read."""
    names = {stored: name_in_text(model, stored) for stored in files.shapes}
    return files.renamed({stored: name for stored, name in names.items() if name is not None})
