"""Architectures whose own forward computes something that input vectors, or rows packed into one, do not give."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ptune_dist.tiny.make import build_tokenizer

SIZES = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


class ByIdsConfig(LlamaConfig):
    model_type = "by_ids"


class ByIds(LlamaForCausalLM):
    """Adds something to the embeddings of even token ids."""

    config_class = ByIdsConfig

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
        if input_ids is not None:
            even = (input_ids % 2 == 0)[..., None]
            vectors = self.get_input_embeddings()(input_ids)
            inputs_embeds = vectors + (0.05 * even).to(vectors.dtype)
        return super().forward(inputs_embeds=inputs_embeds, **others)


class LeakyConfig(LlamaConfig):
    model_type = "leaky"


class Leaky(LlamaForCausalLM):
    """Sums over all positions before, as a state does, whichever text they belong to."""

    config_class = LeakyConfig

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
        vectors = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=vectors + 0.05 * vectors.cumsum(dim=1), **others)


class FarConfig(LlamaConfig):
    model_type = "far"


class Far(LlamaForCausalLM):
    """Has smaller embeddings where a pass has more than 40 positions."""

    config_class = FarConfig

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
        vectors = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=vectors / (2 if vectors.shape[1] > 40 else 1), **others)


class SlightConfig(LlamaConfig):
    model_type = "slight"


class Slight(LlamaForCausalLM):
    """Adds a little to the embeddings of even token ids, less than half precision tells of one output."""

    config_class = SlightConfig

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **others: Any) -> Any:
        if input_ids is not None:
            vectors = self.get_input_embeddings()(input_ids)
            inputs_embeds = vectors + 0.003 * (input_ids % 2 == 0)[..., None].to(vectors.dtype)
        return super().forward(inputs_embeds=inputs_embeds, **others)


class FailingConfig(LlamaConfig):
    model_type = "failing"


class Failing(LlamaForCausalLM):
    """Reads the attention mask as one of two dimensions."""

    config_class = FailingConfig

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        assert attention_mask.dim() == 2, "a mask of\ntwo dimensions"
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **others)


STRANGE: dict[str, tuple[type[LlamaConfig], type[LlamaForCausalLM]]] = {
    "by_ids": (ByIdsConfig, ByIds),
    "leaky": (LeakyConfig, Leaky),
    "far": (FarConfig, Far),
    "slight": (SlightConfig, Slight),
    "failing": (FailingConfig, Failing),
}


def register() -> None:
    for kind, (config_class, model_class) in STRANGE.items():
        AutoConfig.register(kind, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def build_strange(kind: str, folder: Path) -> None:
    config_class, model_class = STRANGE[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
