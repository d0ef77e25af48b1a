"""Tiny mixtures of experts in the layouts that people use."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

WIDE = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FEW = {"head_dim": 8, "num_experts_per_tok": 2}
NARROW = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe", "llama4_text"]


def shape_of(kind: str) -> PretrainedConfig:
    make: Any = transformers
    if kind == "mixtral":
        return make.MixtralConfig(**WIDE, intermediate_size=48, num_local_experts=4)
    if kind == "qwen3_moe":
        return make.Qwen3MoeConfig(**WIDE, **FEW, intermediate_size=48, moe_intermediate_size=16, num_experts=4)
    if kind == "gpt_oss":
        return make.GptOssConfig(**WIDE, **FEW, intermediate_size=32, num_local_experts=4)
    if kind == "olmoe":
        return make.OlmoeConfig(**WIDE, intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    if kind == "granitemoe":
        return make.GraniteMoeConfig(**WIDE, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    if kind == "llama4_text":
        sizes = {"intermediate_size": 16, "intermediate_size_mlp": 48, "num_local_experts": 4}
        return make.Llama4TextConfig(**WIDE, head_dim=8, **sizes, interleave_moe_layer_step=1)
    wide = WIDE | {"num_key_value_heads": 4}
    more = {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    return make.DeepseekV3Config(**wide, **more, **NARROW, **GROUPS)


def save_mixture(kind: str, folder: Path) -> Path:
    """A base with random weights of a size where the experts matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape_of(kind))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder
