"""Quantized layers on a fake GPU: kernels compiled as they would be launched, and what a layer asks of the GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptune_dist.base import quantized_kernels as kernels
from ptune_dist.base.fp8 import E4M3, Fp8Linear
from ptune_dist.base.int8 import Int8Linear
from ptune_dist.base.quantized import QuantizedLinear
from tests.gpu_offline.counting import fake_tensors, report

LAYERS: dict[str, Callable[..., QuantizedLinear]] = {
    "int8": Int8Linear,
    "int8_activations": lambda *sizes: Int8Linear(*sizes, threshold=0.0),
    "fp8": Fp8Linear,
}


@contextmanager
def compiling_only() -> Iterator[list[dict[str, Any]]]:
    """Triton's kernels are compiled for the arguments that they would be launched with; yields what they need."""
    from triton.runtime.jit import JITFunction, MockTensor

    function: Any = JITFunction
    launch = function.run
    compiled: list[dict[str, Any]] = []

    def compile_for(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        described = [MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        kernel = launch(self, *described, grid=grid, warmup=True, **options)
        needs = {"shared": kernel.metadata.shared, "arch": kernel.metadata.target.arch}
        needs["num_fused"] = kernel.asm["ptx"].count("fma.rn")
        compiled.append({"name": self.__name__, "has_machine_code": "cubin" in kernel.asm} | needs)

    function.run = compile_for
    yield compiled
    function.run = launch


def compile_kernels(num_rows: int, num_inputs: int, num_outputs: int, dtype: str, with_fp8: bool) -> list[dict]:
    """Compile what layers of that size launch, forward and backward, for `num_rows` positions of activations."""
    half = getattr(torch, dtype)
    with fake_tensors(), torch.device("cuda"), compiling_only() as compiled:
        weight = torch.empty(num_outputs, num_inputs, dtype=torch.int8)
        scales = torch.empty(num_outputs)
        x = torch.empty(num_rows, num_inputs, dtype=half)
        grad = torch.empty(num_rows, num_outputs, dtype=half)
        kernels.dequantize(weight, scales, half)
        kernels.multiply_int8(x, weight, scales, False)
        kernels.multiply_int8(grad, weight, scales, True)
        kernels.quantize_activations(x, torch.empty(num_inputs), torch.int8)
        kernels.scale_sums(torch.empty(num_rows, num_outputs, dtype=torch.int32), x[:, 0].float(), scales, half)
        kernels.transpose_bytes(weight)
        if with_fp8:
            kernels.quantize_activations(x, None, E4M3)
            kernels.quantize_activations(grad, scales, E4M3)
    return compiled


def run_layer(kind: str, num_rows: int, dtype: str, with_bias: bool, sizes: list[int]) -> dict[str, Any]:
    """Forward and backward of one layer of `sizes` inputs and outputs; what it asked of the GPU, and of what kind."""
    half = getattr(torch, dtype)
    with fake_tensors() as mode, torch.device("cuda"):
        bias = nn.Parameter(torch.empty(sizes[1], dtype=half), requires_grad=False) if with_bias else None
        layer = LAYERS[kind](*sizes, bias)
        for name in ("weight", "scales"):
            empty = layer.get_parameter(name)
            setattr(layer, name, nn.Parameter(torch.empty(empty.shape, dtype=empty.dtype), requires_grad=False))
        x = torch.empty(2, num_rows // 2, sizes[0], dtype=half, requires_grad=True)
        answers: list[torch.Tensor] = []

        def forward() -> None:
            answers.append(layer(x))

        def backward() -> None:
            answers[0].backward(torch.empty_like(answers[0]))

        forward_counts = report(forward, mode)["counts"]
        backward_counts = report(backward, mode)["counts"]
        y, x_grad = answers[0], x.grad
        assert x_grad is not None
        assert (y.dtype, y.shape, y.is_cuda) == (half, (2, num_rows // 2, sizes[1]), True)
        assert (x_grad.dtype, x_grad.shape, x_grad.is_cuda) == (half, x.shape, True)
        return {"forward": forward_counts, "backward": backward_counts}
