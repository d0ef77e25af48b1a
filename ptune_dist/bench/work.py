"""Compare useful work with a machine's peak rate of matrix multiplication.

Useful work is counted in the same way for every side: the operations that a plain pass needs for the tokens, without
padding, forward and backward to the inputs of frozen layers. The ratio of a side that saves work can exceed 1.
"""

import time

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ptune_dist.base.layers import hidden_size, layers_of
from ptune_dist.bench.probe import synchronize

# The peak is measured on as many rows as a micro-batch of training has, for long enough that clocks settle under the
# load: short bursts on few rows find a rate that no training keeps up.
PEAK_ROWS = {"cuda": 8192, "cpu": 1024}  # on a CPU one product of 8,192 rows would take seconds
PEAK_S = 2.0
WARM_UP_S = 0.5


def useful_flops(
    base: PreTrainedModel, lengths: list[int], num_targets: list[int], *, num_virtual: int, recomputes: bool
) -> float:
    """Floating-point operations of rows with `lengths` tokens, `num_targets` of them supervised.

    Per token: 4 for each weight of the layers (6 with recomputation), and 12 for each unit of width and each key that
    the token attends to, virtual tokens included (18 with recomputation). Per supervised token: 4 for each weight of
    the head.
    """
    layers = layers_of(base)
    per_layer = [sum(size_of(p) for p in layer.parameters() if len(shape_of(p)) == 2) for layer in layers]
    width = hidden_size(base)
    passes = 3 if recomputes else 2
    tokens = sum(lengths)
    keys = sum(length * num_virtual + length * (length + 1) / 2 for length in lengths)
    head = base.get_output_embeddings()
    assert head is not None, "an encoder has no head over the vocabulary"
    head_size = size_of(head.get_parameter("weight"))
    return 2 * passes * (sum(per_layer) * tokens + 3 * keys * width * len(layers)) + 4 * head_size * sum(num_targets)


def shape_of(parameter: torch.Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty


def size_of(parameter: torch.Tensor) -> int:
    return shape_of(parameter).numel()


def matmul_peak(base: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of all ranks together in plain products with the shape of the widest layer. Collective.

    The mean over PEAK_S of products without a pause.
    """
    shapes = [shape_of(parameter) for parameter in layers_of(base)[0].parameters()]
    widest = max((shape for shape in shapes if len(shape) == 2), key=lambda shape: shape[0])
    num_rows = PEAK_ROWS[device.type]
    x = torch.randn(num_rows, widest[1], device=device).to(dtype)
    w = torch.randn(widest[0], widest[1], device=device).to(dtype)
    out = torch.empty(num_rows, widest[0], device=device, dtype=dtype)
    per_s = products_per_s(x, w, out, WARM_UP_S, per_timing=1)
    dist.barrier()
    per_s = products_per_s(x, w, out, PEAK_S, per_timing=max(1, round(per_s * PEAK_S / 10)))
    total = torch.tensor([per_s * 2 * num_rows * widest.numel()], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def products_per_s(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, seconds: float, per_timing: int) -> float:
    """Products x @ w.T into `out` per second, over at least `seconds`; the device is asked after each `per_timing`."""
    done = 0
    synchronize()
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        for _ in range(per_timing):
            torch.mm(x, w.T, out=out)
        synchronize()
        done += per_timing
    return done / (time.perf_counter() - began)


def share_of_peak(base: PreTrainedModel, flops_per_s: float) -> dict[str, float]:
    """Useful work per second, the machine's peak, and their ratio. Collective: every rank must call."""
    weight = next(p for p in layers_of(base)[0].parameters() if p.is_floating_point())
    peak = matmul_peak(base, weight.dtype, weight.device)
    return {"useful_flops_per_s": flops_per_s, "matmul_peak_per_s": peak, "matmul_share": flops_per_s / peak}
