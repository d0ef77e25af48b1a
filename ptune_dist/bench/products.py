"""Measure one frozen linear layer, forward and backward to its input, with its weight stored in one of several ways.

    python -m ptune_dist.bench.products SIDE --outputs 5632 --inputs 2048 --tokens 512 --dtype float32 --result FILE

SIDE: `float`; `int8` (the default of model.quantization=int8); on a GPU also `int8-fused` and `int8-dequantized`, its
two ways for any number of tokens; `llm-int8` (int8_activations), `llm-int8-all` (with a threshold of 0); `fp8`;
`linear8bitlt` (the module of bitsandbytes, as PEFT uses it).
"""

import argparse
import statistics
import sys
import time
import warnings

import torch
from torch import nn

from ptune_dist.base import int8
from ptune_dist.base.fp8 import Fp8Linear
from ptune_dist.base.int8 import Int8Linear
from ptune_dist.base.quantized import QuantizedLinear
from ptune_dist.bench.probe import synchronize, write_result

THRESHOLDS = {"llm-int8": 6.0, "llm-int8-all": 0.0}
MAX_FUSED_ROWS = {"int8-fused": sys.maxsize, "int8-dequantized": 0}
SIDES = ("float", "int8", *MAX_FUSED_ROWS, *THRESHOLDS, "fp8", "linear8bitlt")
NUM_REPEATS = 15
CALLS_ON_GPU = 20  # for each timing, so that a short kernel is not timed with the launch of one
NUM_WARM_UP = 3


def build_layer(side: str, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """A frozen linear layer that stores `weight` [outputs, inputs] as `side` does."""
    num_outputs, num_inputs = weight.shape
    if side == "linear8bitlt":
        from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

        layer = Linear8bitLt(num_inputs, num_outputs, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = Int8Params(
            weight.to(dtype),
            requires_grad=False,
            has_fp16_weights=False,  # pyright: ignore[reportCallIssue]  # an argument of its __new__
        )
        return layer.to(weight.device)
    if side == "float":
        layer = nn.Linear(num_inputs, num_outputs, bias=False, device=weight.device, dtype=dtype)
        layer.weight.data.copy_(weight)
        return layer.requires_grad_(False)
    int8.MAX_FUSED_ROWS = MAX_FUSED_ROWS.get(side, int8.MAX_FUSED_ROWS)
    made: QuantizedLinear = Int8Linear(num_inputs, num_outputs, None, THRESHOLDS.get(side))
    if side == "fp8":
        made = Fp8Linear(num_inputs, num_outputs, None)
    quantized, scales = made.quantize(weight)
    made.weight = nn.Parameter(quantized, requires_grad=False)
    made.scales = nn.Parameter(scales.view(torch.int32), requires_grad=False)
    return made


def measure(layer: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Median milliseconds, bytes of activations saved for backward, and the output's error relative to float64."""
    kept: list[torch.Tensor] = []
    weights = {parameter.data_ptr() for parameter in layer.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    num_calls = CALLS_ON_GPU if x.is_cuda else 1
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(NUM_WARM_UP + NUM_REPEATS):
        kept.clear()
        synchronize()
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = [layer(x) for _ in range(num_calls)]
        synchronize()
        middle = time.perf_counter()
        for output in outputs:
            torch.autograd.grad(output, x, output.detach())
        synchronize()
        forward.append(1000 * (middle - began) / num_calls)
        backward.append(1000 * (time.perf_counter() - middle) / num_calls)
    y = layer(x)
    kept = kept[: len(kept) // num_calls]
    kept += [t for t in getattr(y.grad_fn, "tensors", ()) if t is not None]  # bitsandbytes has its own list
    error = (y.detach().double() - wanted).norm() / wanted.norm()
    return {
        "forward_ms": statistics.median(forward[NUM_WARM_UP:]),
        "backward_ms": statistics.median(backward[NUM_WARM_UP:]),
        "kept_bytes": float(sum(tensor.nbytes for tensor in kept)),
        "error": error.item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--outputs", type=int, required=True)
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--result", required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(args.outputs, args.inputs, generator=generator) * 0.02).to(device)
    x = torch.randn(1, args.tokens, args.inputs, generator=generator).to(device, dtype).requires_grad_()
    wanted = x.detach().double() @ weight.double().T
    write_result(args.result, measure(build_layer(args.side, weight, dtype), x, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
