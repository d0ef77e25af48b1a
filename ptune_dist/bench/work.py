"""How much of a machine's matrix-multiplication peak useful work reaches.

Useful work is counted the same for every side, from real tokens alone: what a plain pass would need for them, forward
and backward to the inputs of frozen layers. A side that saves work can pass 1.
"""

import time

import torch
import torch.distributed as dist
from torch import nn

from ptune_dist.base.layers import hidden_size, layers_of
from ptune_dist.bench.probe import synchronize

PEAK_SECONDS, PEAK_ROWS = 1.0, 1024


def useful_flops(
    base: nn.Module, lengths: list[int], num_targets: list[int], *, num_virtual: int, recomputes: bool
) -> float:
    """Floating-point operations of rows with `lengths` tokens, `num_targets` of them supervised.

    4N a token of the layers' N weights (6N with recomputation), attention over the virtual tokens and what precedes a
    token, 12 a key and width (18 with recomputation), and the head at supervised positions, 4 a weight.
    """
    layers = layers_of(base)
    per_layer = [sum(size_of(p) for p in layer.parameters() if len(shape_of(p)) == 2) for layer in layers]
    width, passes = hidden_size(base), 3 if recomputes else 2
    tokens = sum(lengths)
    keys = sum(length * num_virtual + length * (length + 1) / 2 for length in lengths)
    head = size_of(base.get_output_embeddings().weight)
    return 2 * passes * (sum(per_layer) * tokens + 3 * keys * width * len(layers)) + 4 * head * sum(num_targets)


def shape_of(parameter: torch.Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the shape aside


def size_of(parameter: torch.Tensor) -> int:
    return shape_of(parameter).numel()


def matmul_peak(base: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second that all ranks together reach now in plain products of the base's shapes. Collective."""
    widest = max((shape_of(p) for p in layers_of(base)[0].parameters() if len(shape_of(p)) == 2), key=lambda s: s[0])
    x, w = (torch.randn(n, widest[1], device=device).to(dtype) for n in (PEAK_ROWS, widest[0]))
    dist.barrier()
    count, best, ends = 0, 0.0, time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < ends or not count:
        synchronize()
        began = time.perf_counter()
        for _ in range(5):
            x @ w.T
        synchronize()
        best, count = max(best, 5 / (time.perf_counter() - began)), count + 1
    total = torch.tensor([best * 2 * PEAK_ROWS * widest.numel()], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def share_of_peak(base: nn.Module, flops_per_s: float) -> dict[str, float]:
    """The figures of a side that does so much useful work. Collective: every rank must call."""
    weight = next(p for p in layers_of(base)[0].parameters() if p.is_floating_point())
    peak = matmul_peak(base, weight.dtype, weight.device)
    return {"useful_flops_per_s": flops_per_s, "matmul_peak_per_s": peak, "matmul_share": flops_per_s / peak}
