"""What a GPU cannot compute in is refused in one line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptune_dist.errors import UserError
from ptune_dist.run.parts import check_precision


def check(monkeypatch, dtype: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    config: Any = SimpleNamespace(model=SimpleNamespace(dtype=dtype))
    check_precision(config)


def test_bfloat16_on_a_t4_is_refused(monkeypatch):
    with pytest.raises(UserError) as refused:
        check(monkeypatch, "bfloat16", (7, 5))
    assert str(refused.value) == (
        "model.dtype: bfloat16 needs a GPU of compute capability 8.0 or newer, and this Tesla T4 has 7.5: use float16"
    )


@pytest.mark.parametrize(("dtype", "capability"), [("float16", (7, 5)), ("float32", (7, 5)), ("bfloat16", (8, 0))])
def test_what_the_gpu_has_is_accepted(monkeypatch, dtype, capability):
    check(monkeypatch, dtype, capability)
