"""Facts about a transformers model, found by its structure instead of by names."""

from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

LayerHeads = tuple[int | None, int | None, int | None]  # key/value heads, widths of a key and of a value

KEEP_LATENTS = ("bailing_hybrid", "kimi_linear")  # the latent of keys and values, and keys of positions apart
MIN_SHARE = 0.1  # of the largest stack's parameters; smaller module lists are not stacks of layers


def layer_stacks(base: nn.Module) -> list[nn.ModuleList]:
    """The stacks of transformer layers, the encoder's before the decoder's: the outermost large module lists."""
    outermost: list[nn.ModuleList] = []
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and not any(module in stack.modules() for stack in outermost):
            outermost.append(module)
    sizes = {id(stack): sum(parameter_size(p) for p in stack.parameters()) for stack in outermost}
    largest = max(sizes.values(), default=0)
    return [stack for stack in outermost if sizes[id(stack)] >= MIN_SHARE * largest]


def layers_of(base: nn.Module) -> list[nn.Module]:
    """Every transformer layer, in the order of its stacks."""
    return [layer for stack in layer_stacks(base) for layer in stack]


def name_first_layers(base: PreTrainedModel) -> list[str]:
    """The names of the layers of the first stack."""
    names = {id(module): name for name, module in base.named_modules()}
    return [names[id(layer)] for layer in layer_stacks(base)[0]]


def name_modules(base: PreTrainedModel) -> dict[str, Any]:
    """The names of some modules: `embeddings`, and `attentions_from_last` of the layers, from the last to the first."""
    tokens = base.get_input_embeddings()
    return {
        "embeddings": next(name for name, module in base.named_modules() if module is tokens),
        "attentions_from_last": [name for name, _ in attentions_of(base)][::-1],
    }


def attentions_of(base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Names and modules of self-attention, in the order of the layers; of those that call transformers' functions."""
    found = [(name, m) for name, m in base.named_modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    return [(name, module) for name, module in found if not getattr(module, "is_cross_attention", False)]


def num_first_layers(base: PreTrainedModel) -> int | None:
    """The layers of the first stack, an encoder's before a decoder's; None where they are no plain stack of layers.

    ALBERT calls one layer again and again, and XLM's layers are in several lists.
    """
    stacks = layer_stacks(base)
    if len(stacks) != 1 + bool(base.config.is_encoder_decoder):
        return None
    text = base.config.get_text_config(encoder=True) if len(stacks) == 2 else base.config.get_text_config(decoder=True)
    count = len(stacks[0])
    named = {getattr(text, name, None) for name in ("num_hidden_layers", "encoder_layers", "num_layers")}
    is_plain = count in named and not any(isinstance(layer, nn.ModuleList) for layer in stacks[0])
    return count if is_plain else None


def parameter_size(parameter: nn.Parameter) -> int:
    """Elements of a whole parameter, even if ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def partition_of(parameter: nn.Parameter) -> Any:
    """This rank's part of a parameter that ZeRO-3 has partitioned, with DeepSpeed's attributes; None if it is whole."""
    return getattr(parameter, "ds_tensor", None)


def held_bytes(base: nn.Module) -> int:
    """Bytes of the frozen base in this rank's memory: its partitions, including those of hpZ, and whole buffers."""
    frozen = [parameter for parameter in base.parameters() if not parameter.requires_grad]  # not an encoder's head
    return sum(buffer.nbytes for buffer in base.buffers()) + sum(memory_bytes(parameter) for parameter in frozen)


def memory_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter in this rank's memory."""
    part = partition_of(parameter)
    if part is None:
        return parameter.nbytes
    secondary = getattr(parameter, "ds_secondary_tensor", None)  # hpZ's
    held = 0 if is_on_disk(parameter) else part.ds_numel * parameter.element_size()
    return held + (secondary.nbytes if secondary is not None else 0)


def disk_bytes(base: nn.Module) -> int:
    """Bytes of the base that this rank stores on disk."""
    on_disk = [parameter for parameter in base.parameters() if is_on_disk(parameter)]
    return sum(partition_of(parameter).ds_numel * parameter.element_size() for parameter in on_disk)


def is_on_disk(parameter: nn.Parameter) -> bool:
    return getattr(partition_of(parameter), "final_location", None) == "nvme"


def embedding_width(base: PreTrainedModel) -> int:
    """D, the width of an input embedding, which is not always the hidden size (OPT)."""
    return cast(int, base.get_input_embeddings().embedding_dim)


def hidden_size(base: PreTrainedModel) -> int:
    return base.config.get_text_config().hidden_size


def keys_values_width(shape: PretrainedConfig) -> int:
    """The numbers that a layer of a base with attention holds of one position: its keys and its values."""
    num_heads, of_keys, of_values = key_value_heads(shape)
    assert num_heads is not None and of_keys is not None and of_values is not None, "asked of bases with heads only"
    return num_heads * (of_keys + of_values)


def key_value_heads(shape: PretrainedConfig) -> tuple[int | None, int | None, int | None]:
    """The number of key/value heads as attention reads them, and the widths of a key and of a value.

    None where a base has no attention heads, or differing ones.
    """
    num_heads, of_keys, of_values = (the_one(set(numbers)) for numbers in zip(*heads_by_layer(shape), strict=True))
    return num_heads, of_keys, of_values


def heads_of_half(base: PreTrainedModel, half: str) -> tuple[int | None, int | None]:
    """The key/value heads and their width of an encoder-decoder's `encoder` or `decoder`, whose numbers may differ."""
    module = base.get_encoder() if half == "encoder" else base.get_decoder()
    text = module.config.get_text_config()
    names = {"encoder": "encoder_attention_heads", "decoder": "decoder_attention_heads"}
    own = getattr(text, names[half], None)  # of both halves in one config
    if getattr(text, "hidden_size", None) is None:
        return None, None
    return (own, text.hidden_size // own) if own else heads_of(text)[:2]


def num_key_value_heads(shape: PretrainedConfig) -> int | None:
    """G; None where a base has no attention heads, or differing ones."""
    return key_value_heads(shape)[0]


def head_width(shape: PretrainedConfig) -> int | None:
    """The width of an attention head; None where a base has none, or differing ones."""
    return key_value_heads(shape)[1]


def layers_differ(shape: PretrainedConfig) -> bool:
    """Whether keys and values of one position have another shape in some layers than in others, as in Gemma 4."""
    return len(set(heads_by_layer(shape))) > 1


def heads_by_layer(shape: PretrainedConfig) -> list[LayerHeads]:
    """Of each layer, the number of key/value heads and the widths of a key and of a value, as if all had attention."""
    text = shape.get_text_config(decoder=True)
    layers = shapes_of_layers(text)
    found = [heads_of(layer) for layer in layers]
    if len(layers) == 1:
        found *= max(1, getattr(text, "num_hidden_layers", None) or 1)
    kinds = getattr(text, "layer_types", None) or []
    if getattr(text, "swa_head_dim", None):  # Inkling's layers with a window
        own = (text.swa_num_key_value_heads, text.swa_head_dim, text.swa_head_dim)
        return [own if kind == "hybrid_sliding" else heads for kind, heads in zip(kinds, found, strict=True)]
    if text.model_type == "mimo_v2_flash":  # its layers with a window have twice as many
        pairs = zip(kinds, found, strict=True)
        return [(2 * (n or 0), k, v) if kind == "sliding_attention" else (n, k, v) for kind, (n, k, v) in pairs]
    return found


def shapes_of_layers(text: PretrainedConfig) -> list[PretrainedConfig]:
    """The shape of each layer, where they differ by transformers' `per_layer_config`; else the one of all layers."""
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def setting_of(shape: PretrainedConfig, name: str) -> Any:
    """A setting of all layers; None where there is none, or differing ones."""
    values = [getattr(layer, name, None) for layer in shapes_of_layers(shape)]
    return values[0] if all(value == values[0] for value in values) else None


def heads_of(text: PretrainedConfig) -> LayerHeads:
    """The number of key/value heads that are kept of a position, and the widths of a key and of a value."""
    num_heads = getattr(text, "num_attention_heads", None)
    if text.model_type in KEEP_LATENTS:
        return 1, text.kv_lora_rank, text.qk_rope_head_dim
    if getattr(text, "qk_nope_head_dim", None) is not None:  # made of one latent, for every head
        of_values = getattr(text, "v_head_dim", None) or text.hidden_size // text.num_attention_heads
        return num_heads, text.qk_nope_head_dim + text.qk_rope_head_dim, of_values
    hidden = getattr(text, "true_hidden_size", None) or text.hidden_size  # within MobileBERT's bottlenecks
    width = getattr(text, "head_dim", None) or (hidden // num_heads if num_heads else None)
    of_values = text.v_head_dim if text.model_type == "mimo_v2_flash" else width
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1, width, of_values  # GPT BigCode and the first Falcon
    return getattr(text, "num_key_value_heads", None) or num_heads, width, of_values


def the_one(found: set[int | None]) -> int | None:
    """The only element; None where there are several."""
    return found.pop() if len(found) == 1 else None


def max_positions(base: PreTrainedModel) -> int | None:
    """The number of learned position embeddings, or None if positions are computed (rotary, ALiBi)."""
    text = base.config.get_text_config()
    if text.model_type == "mpt":  # ALiBi, but from a table of fixed size
        return text.max_seq_len
    tokens = base.get_input_embeddings()
    tables = {n: m for n, m in base.named_modules() if isinstance(m, nn.Embedding) and m is not tokens}
    num_positions = getattr(text, "max_position_embeddings", None)
    if not tables or num_positions is None:
        return None
    return num_positions - first_position(base)


def first_position(base: PreTrainedModel) -> int:
    """The number of the first learned position, which is one more than the padding token's id in RoBERTa."""
    tables = [m for name, m in base.named_modules() if "position" in name and isinstance(m, nn.Embedding)]
    return max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)
