"""Tiny random bases of any architecture, saved as a user would have them.

Every number of an architecture's own configuration that sets a size is replaced by a small one, by its name; what does
not fit a rule of the architecture is in `SPECIAL`.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ptune_dist.tiny.make import build_tokenizer

LABELS = ["short", "middle", "long"]
VOCAB = 272  # above the tokenizer's 258 ids, as real vocabularies have room
NUM_LAYERS = 2

SMALL: dict[str, Any] = (
    dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "vocab_size_or_config_json_file"], VOCAB)
    | dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"], 32)
    | dict.fromkeys(["intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "d_inner", "ffn_hidden_size"], 64)
    | dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"], 64)
    | dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"], NUM_LAYERS)
    | dict.fromkeys(["decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"], NUM_LAYERS)
    | dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"], 4)
    | dict.fromkeys(["decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"], 4)
    | dict.fromkeys(["num_key_value_heads", "num_local_experts", "num_experts_per_tok", "moe_topk", "top_k"], 2)
    | dict.fromkeys(["num_experts", "n_routed_experts", "moe_num_experts", "n_experts"], 4)
    | dict.fromkeys(["head_dim", "d_kv", "global_head_dim", "attention_head_dim", "qk_nope_head_dim"], 8)
    | dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 16)
    | dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"], 16)
    | {"qk_rope_head_dim": 4, "v_head_dim": 6}  # values are narrower than keys, as in DeepSeek-V3
    | dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_encoder_position_embeddings"], 160)
    | {"qk_head_dim": 12, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"sliding_window": 16, "attention_window": 16, "local_attention": 16, "local_radius": 7, "block_size": 8}
    | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8, "rotary_dim": 4}
    | {"state_size": 8, "conv_kernel": 4, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_dt_rank": 4, "chunk_size": 8}
    | {"mamba_chunk_size": 8, "time_step_rank": 4, "lru_width": 32, "attention_window_size": 16}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {
        "hidden_size_global": 32,
        "type_vocab_size": 2,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 1,
    }
    | {"forced_bos_token_id": None, "forced_eos_token_id": None, "image_size": 28, "patch_size": 14}
)

FOLLOWS = ("head_dim", "n_inner", "mamba_dt_rank", "q_lora_rank", "v_head_dim")  # from other sizes, where none is given

# What an architecture's own rules ask for.
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_expand": 2, "mamba_n_groups": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_expand": 2,
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "marian": {"tie_word_embeddings": True},
    "fsmt": {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "langs": ["en", "de"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "xlm": {"emb_dim": 32, "n_words": VOCAB},
    "flaubert": {"emb_dim": 32, "n_words": VOCAB},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "ctrl": {"dff": 64},
    "bert-generation": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "gemma4_text": {"hidden_size_per_layer_input": 0},  # those with such inputs are refused, as Gemma 3n
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "t5gemma": {"decoder_start_token_id": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "num_mem_blocks": 1, "hybrid_layer_ids": [1]},
    "m2m_100": {"decoder_start_token_id": 2},  # it counts positions by what is not padding
    "nllb-moe": {"decoder_start_token_id": 2},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "recurrent_gemma": {"num_hidden_layers": 3},  # the third has attention
    "xlstm": {"hidden_size": 128},  # widths are rounded up to 64
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "esmc": {"num_key_value_heads": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "deepseek_v3": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
}


def kinds() -> dict[str, list[str]]:
    """Model types by family, each in the first that has it."""
    seq2seq = list(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encoder = [
        kind for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if kind in masked and kind not in seq2seq
    ]
    causal = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in encoder and kind not in seq2seq]
    return {"causal": causal, "seq2seq": seq2seq, "encoder": encoder}


# Every head has keys and values of its own, made of one latent.
for latent in (
    "axk2",
    "bailing_hybrid",
    "deepseek_v32",
    "glm4_moe_lite",
    "minicpm3",
    "youtu",
    "glm_moe_dsa",
    "kimi_linear",
    "axk1",
    "dots3_note_text",
):
    SPECIAL.setdefault(latent, {})["num_key_value_heads"] = 4


def build_shape(kind: str) -> Any:
    """A small configuration of a model type. Raises what the class of the architecture raises."""
    return small_config(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))


def small_config(config_class: Any, special: dict[str, Any]) -> Any:
    known = set(inspect.signature(config_class.__init__).parameters) | set(dir(config_class))
    known |= set(getattr(config_class, "__dataclass_fields__", {}))
    values = {name: value for name, value in SMALL.items() if name in known}
    if "block_sizes" in known or "num_encoder_layers" in known and "num_decoder_layers" in known:
        values.pop("num_hidden_layers", None)
    renamed = getattr(config_class, "attribute_map", {})
    fixed = {name for name in dir(config_class) if is_computed(config_class, name)}
    fixed |= {name for name, other in renamed.items() if other in fixed}
    values = {name: value for name, value in values.items() if name not in renamed and name not in fixed}
    default = config_class()
    for name in list(values):
        if value_of(default, name) is None and name in FOLLOWS:
            del values[name]
    if not fixed & {"layer_types", "layers_block_type"}:
        values |= layer_lists(default)
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if isinstance(part, type) and part is not AutoConfig:
            values[name] = small_config(part, SPECIAL.get(part.model_type, {})).to_dict()
        elif getattr(default, name, None) is not None:
            kind = type(getattr(default, name))
            values[name] = small_config(kind, SPECIAL.get(kind.model_type, {})).to_dict()
    found = {name: value for name, value in (values | special).items() if name not in fixed}
    if config_class.model_type == "xlnet":  # it has no limit, and refuses one
        del found["max_position_embeddings"]
    return config_class(**found)


def is_computed(config_class: Any, name: str) -> bool:
    """Whether an attribute follows from others and cannot be set."""
    attribute = inspect.getattr_static(config_class, name)
    return isinstance(attribute, property) and attribute.fset is None


def value_of(shape: Any, name: str) -> Any:
    try:
        return getattr(shape, name, None)
    except Exception:  # it may vary across layers
        return None


def layer_lists(default: Any) -> dict[str, Any]:
    """What has an entry for each layer, such as `layer_types`: one layer of every kind."""
    types = getattr(default, "layer_types", None)
    if not types:
        return {}
    some = list(dict.fromkeys(types))
    wanted = (some * NUM_LAYERS)[: max(NUM_LAYERS, len(some))]
    found: dict[str, Any] = {"layer_types": wanted, "num_hidden_layers": len(wanted)}
    for name in ("mlp_layer_types", "activation_sparsity_pattern"):
        values = getattr(default, name, None)
        if isinstance(values, (list, tuple)):
            found[name] = list(values[-len(wanted) :])
    return found


AUTO = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "encoder": AutoModelForSequenceClassification,
}


def build_base(kind: str, family: str, folder: Path) -> Path:
    """Make and save one with its tokenizer. Raises what the class of the architecture raises."""
    torch.manual_seed(0)
    shape = build_shape(kind)
    if family == "seq2seq" and value_of(shape, "decoder_start_token_id") is None:
        shape.decoder_start_token_id = 1
    if family == "encoder":
        shape.id2label = dict(enumerate(LABELS))
    model = AUTO[family].from_config(shape, dtype=torch.float32).eval()
    with torch.no_grad():  # no parameter is one or zero, and numbers are large enough to be worth comparing
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
