"""Where things are in a transformers model, found by structure and not by name."""

from torch import nn
from transformers import PreTrainedModel

LEAST_SHARE = 0.1  # of the largest stack's parameters: smaller module lists are no stacks of layers


def layer_stacks(base: PreTrainedModel) -> list[nn.ModuleList]:
    """The stacks of transformer layers, an encoder's before its decoder's: outermost module lists of weight."""
    outermost: list[nn.ModuleList] = []
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and not any(module in stack.modules() for stack in outermost):
            outermost.append(module)
    sizes = {id(stack): sum(parameter_size(p) for p in stack.parameters()) for stack in outermost}
    largest = max(sizes.values(), default=0)
    return [stack for stack in outermost if sizes[id(stack)] >= LEAST_SHARE * largest]


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """Every transformer layer, in the order of its stacks."""
    return [layer for stack in layer_stacks(base) for layer in stack]


def parameter_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where ZeRO-3 has cut it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def held_bytes(base: nn.Module) -> int:
    """Bytes of the frozen base in this rank's memory: its parts under ZeRO-3, those of hpZ too, and whole buffers."""
    held = sum(buffer.nbytes for buffer in base.buffers())
    for parameter in base.parameters():
        if parameter.requires_grad:  # an encoder's head
            continue
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            held += parameter.nbytes
        else:
            held += 0 if is_on_disk(parameter) else part.ds_numel * parameter.element_size()
            second = getattr(parameter, "ds_secondary_tensor", None)
            held += second.nbytes if second is not None else 0
    return held


def disk_bytes(base: nn.Module) -> int:
    """Bytes of the base that this rank keeps on a disk."""
    return sum(p.ds_tensor.ds_numel * p.element_size() for p in base.parameters() if is_on_disk(p))


def is_on_disk(parameter: nn.Parameter) -> bool:
    return getattr(getattr(parameter, "ds_tensor", None), "final_location", None) == "nvme"


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
    tokens = base.get_input_embeddings()
    tables = {n: m for n, m in base.named_modules() if isinstance(m, nn.Embedding) and m is not tokens}
    most = getattr(text, "max_position_embeddings", None)
    if not tables or most is None:
        return None
    # RoBERTa counts positions from the padding token's id on
    counted_from = [m.padding_idx + 1 for n, m in tables.items() if "position" in n and m.padding_idx is not None]
    return most - max(counted_from, default=0)
