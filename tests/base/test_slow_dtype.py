"""A CPU without instructions for a type: one line for a large base, none where it makes no difference."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ptune_dist.base import slow_dtype
from ptune_dist.base.slow_dtype import LEAST_PARAMETERS, describe_slow_dtype, time_product

CPU = torch.device("cpu")


def opened(dtype: torch.dtype, num_parameters: int = LEAST_PARAMETERS) -> SimpleNamespace:
    with torch.device("meta"):
        weight = nn.Linear(num_parameters, 1, bias=False, dtype=dtype)
    return SimpleNamespace(dtype=dtype, model=SimpleNamespace(num_parameters=lambda: weight.weight.numel()))


@pytest.fixture
def slow_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_dtype, "time_product", lambda dtype: 0.001 if dtype == torch.float32 else 0.009)


def test_a_product_takes_time() -> None:
    assert time_product(torch.float32) > 0
    assert time_product(torch.bfloat16) > 0


@pytest.mark.usefixtures("slow_bfloat16")
def test_a_slow_type_gets_a_line() -> None:
    line = describe_slow_dtype(opened(torch.bfloat16), CPU)
    assert line.startswith("warning: model.dtype: this CPU multiplies bfloat16 numbers 9 times as slowly as float32")
    assert "model.dtype=float32" in line


@pytest.mark.usefixtures("slow_bfloat16")
@pytest.mark.parametrize(
    ("base", "device"),
    [
        (opened(torch.float32), CPU),
        (opened(torch.bfloat16, LEAST_PARAMETERS - 1), CPU),
        (opened(torch.bfloat16), torch.device("cuda")),
    ],
)
def test_nothing_to_say(base: SimpleNamespace, device: torch.device) -> None:
    assert describe_slow_dtype(base, device) == ""


def test_no_line_where_the_type_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_dtype, "time_product", lambda dtype: 0.001)
    assert describe_slow_dtype(opened(torch.bfloat16), CPU) == ""
