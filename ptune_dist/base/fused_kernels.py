"""Functions of tensors that `torch.compile` turns into one kernel each; they run as written where that fails.

A kernel is compiled at its first use, once for all numbers of rows, and its first result is compared with that of the
function as written. Both are right, so a rank that falls back computes the same curve as one that does not.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

# What a compiled result may differ by, relative to the largest number: it rounds at other places.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NUM_COMPARED = 64  # rows
# Elements from which a CPU compiles too: none. Products take most of the time there: compiled layers gain 2 to 5%
# (docs/benchmarks/fused_cpu.json, made by `ptune_dist.bench.fused`), and compiling takes half a minute.
MIN_CPU_ELEMENTS = 1 << 62

ERROR_NAME = re.compile(r"[\w.]*(Error|Exception|Missing|Unsupported|Failed)\b")

Tensors = list[torch.Tensor]


class Fallback:
    """Why nothing is compiled in this process, and who is told once."""

    reason: str | None = None
    report: Callable[[str], None] = staticmethod(lambda _line: None)

    @classmethod
    def take(cls, reason: str) -> None:
        if cls.reason is None:
            cls.reason = reason
            cls.report(f"model.compile: norms, activations and rotations run one operation at a time: {reason}")


class Kernel:
    """A function (*rows, *others, *options) -> tuple of tensors; compiled for any number of rows."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        self._checked: set[tuple] = set()

    def __call__(self, rows: Tensors, others: Tensors, *options: Any) -> Any:
        """`rows` are tensors [N, ...] of one N; every row is computed on its own. `others` have fixed shapes."""
        # Without a history: Dynamo compiles anew for tensors that differ in requires_grad.
        rows = [tensor.detach() for tensor in rows]
        others = [tensor.detach() for tensor in others]
        if Fallback.reason is not None or rows[0].shape[0] < 2:  # Dynamo compiles anew for one row
            return self._function(*rows, *others, *options)
        try:
            return self._run(rows, others, options)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # of Dynamo, Inductor, Triton, a C compiler
            Fallback.take(f"{self._function.__name__} cannot be compiled ({describe(error)})")
            return self._function(*rows, *others, *options)

    def _run(self, rows: Tensors, others: Tensors, options: tuple) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=False, fullgraph=True)
        for tensor in rows:
            torch._dynamo.mark_dynamic(tensor, 0)
        result = self._compiled(*rows, *others, *options)
        key = (rows[0].device.type, *(tensor.dtype for tensor in rows), *(t.shape[1:] for t in rows), *options)
        if key not in self._checked:
            self._checked.add(key)
            self._compare(result, rows, others, options)
        return result

    def _compare(self, result: Any, rows: Tensors, others: Tensors, options: tuple) -> None:
        """Raise ArithmeticError where the compiled function differs from the one as written."""
        wanted = self._function(*(tensor[:NUM_COMPARED] for tensor in rows), *others, *options)
        for found, right in zip(result, wanted, strict=True):
            tolerance = TOLERANCES[rows[0].dtype]
            right = right.float()
            bound = tolerance * right.nan_to_num(0, 0, 0).abs().amax()
            close = torch.isclose(found[:NUM_COMPARED].float(), right, rtol=tolerance, atol=0, equal_nan=True)
            close |= (found[:NUM_COMPARED].float() - right).abs() <= bound
            if not close.all():
                raise ArithmeticError("its result differs from that of the function as written")


def describe(error: Exception) -> str:
    """One line; of an error that quotes a traceback, its last."""
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines()]
    named = [line for line in lines if ERROR_NAME.match(line)]
    return (named or lines)[-1][:300]


def is_worth_it(x: torch.Tensor) -> bool:
    """Whether a tensor [..., D] is to be given to a kernel, and not to the module that transformers wrote."""
    if Fallback.reason is not None or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return x.is_cuda or x.numel() >= MIN_CPU_ELEMENTS
