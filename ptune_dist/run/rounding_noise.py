"""How far rounding alone moves a base's outputs, measured on the base itself.

Bases differ widely in it: by weights, depth and architecture. In half precision a limit that suits all of them would
miss small differences in most. So the same pass is run again with every embedding changed by about one rounding step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

SEED = 0
LEAST_OUTPUTS = 32  # fewer tell too little about their spread
# Limits, as multiples of the root mean square (RMS) of what that change does to the outputs. Of ours and the base's own
# outputs, 44 or 48 of each, the RMS of the differences was up to 1.11 of it, the mean 0.23 and the largest 3.6: llama,
# qwen2, gemma3, gpt2, t5, mt5 and bart in bfloat16, 2 to 24 layers deep, with weights of two scales, both placements.
# A tenth of a row's last position that leaks into the next row gives 1.6 to 2, and 4.9 to 8 for the largest.
MOST_RMS = 1.75
MOST_MEAN = 0.6
MOST_OF_ONE = 6.0
# Of one rounding step of the largest output: a trained base may round more in its last layers than in its embeddings.
LEAST_RMS = 0.25
LEAST_MEAN = 0.08
LEAST_OF_ONE = 1.0


@contextmanager
def rounded_embeddings(base: PreTrainedModel) -> Iterator[None]:
    """The base's embeddings differ by one step of their precision up or down, at random but always in the same way."""
    draw = torch.Generator().manual_seed(SEED)

    def change(_: nn.Module, __: Any, vectors: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, vectors.shape, generator=draw).to(vectors.device) * 2 - 1
        return (vectors.float() * (1 + torch.finfo(vectors.dtype).eps * signs)).to(vectors.dtype)

    owners = [base, base.get_decoder()] if base.config.is_encoder_decoder else [base]
    tables = {id(table): table for table in (cast(nn.Module, owner.get_input_embeddings()) for owner in owners)}
    hooks = [table.register_forward_hook(change) for table in tables.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def describe_excess(ours: torch.Tensor, plain: torch.Tensor, noise: torch.Tensor, step: float) -> str | None:
    """By what outputs [U] differ more than rounding explains, or None; `noise` is what rounding does to each.

    step: how far apart numbers as large as the largest output are in the base's precision.
    """
    difference = ours - plain
    if len(difference) < LEAST_OUTPUTS or not (difference.isfinite() & noise.isfinite()).all():
        return None
    spread = rms(noise)
    measures = (
        ("the root mean square of differences between outputs", rms(difference), MOST_RMS, LEAST_RMS),
        ("the mean difference between outputs", abs(difference.mean().item()), MOST_MEAN, LEAST_MEAN),
        ("the largest difference between outputs", difference.abs().max().item(), MOST_OF_ONE, LEAST_OF_ONE),
    )
    for what, value, most, least in measures:
        allowed = max(most * spread, least * step)
        if value > allowed:
            return f"{what} is {value:.2g}, where rounding explains {allowed:.2g}"
    return None


def rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()
