"""Where things are in a transformers model, found by structure and not by name."""

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers: the module list that holds the most parameters."""
    stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(parameter_size(p) for p in stack.parameters()))


def parameter_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where ZeRO-3 has cut it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def embedding_width(base: PreTrainedModel) -> int:
    """D, the width of an input embedding. OPT's is not always the hidden size."""
    return base.get_input_embeddings().embedding_dim


def hidden_size(base: PreTrainedModel) -> int:
    return base.config.get_text_config().hidden_size


def max_positions(base: PreTrainedModel) -> int | None:
    """The most positions that learned position embeddings have; None where positions are computed (rotary, ALiBi)."""
    text = base.config.get_text_config()
    if text.model_type == "mpt":  # ALiBi, but from a table of fixed length
        return text.max_seq_len
    learned = any(
        isinstance(module, nn.Embedding) and module is not base.get_input_embeddings() for module in base.modules()
    )
    return getattr(text, "max_position_embeddings", None) if learned else None
