"""A small function, compiled and eager, to see that the fakes count what they should."""

from typing import Any

import torch

from tests.gpu_offline.counting import fake_tensors, report


def gated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * y + 1


def compile_gated(num_rows: int, is_compiled: bool, dtype: str) -> dict[str, Any]:
    """Forward and backward of [num_rows, 64]."""
    function = torch.compile(gated, dynamic=True) if is_compiled else gated
    with fake_tensors() as mode:
        x, y = (
            torch.empty(num_rows, 64, dtype=getattr(torch, dtype), device="cuda", requires_grad=True) for _ in range(2)
        )
        return report(lambda: function(x, y).backward(torch.ones_like(x)), mode)


def wait() -> list[str]:
    """Every way in which the host waits, once."""
    with fake_tensors() as mode:
        x = torch.ones(8, device="cuda")
        return report(lambda: (x.sum().item(), x.cpu(), x.to("cpu", torch.float64)), mode)["counts"]["waits"]
