"""The fakes themselves: they compile for the architecture asked for, and count launches, bytes and waits."""

from typing import Any

import pytest

from tests.gpu_offline.fake_cuda import GPUS
from tests.gpu_offline.faked import run_faked

pytestmark = [pytest.mark.long, pytest.mark.extended]  # all other tests of this folder rely on what these check

WORK = "tests.gpu_offline.work_elementwise"


@pytest.fixture(scope="module")
def on_a_t4() -> list[Any]:
    """The eager function, the compiled one, and waits. A T4 has no bf16: Inductor refuses it, on a fake one too."""
    gated = {"function": "compile_gated", "num_rows": 100, "dtype": "float16"}
    calls = [gated | {"is_compiled": is_compiled} for is_compiled in (False, True)]
    return run_faked(f"{WORK}:run", [*calls, {"function": "wait"}], "sm_75")


def test_compiled_functions_are_counted(on_a_t4):
    eager, fused, _ = on_a_t4
    size = 100 * 64 * 2
    assert not eager["kernels"]
    major, minor = GPUS["sm_75"].capability
    assert {kernel["arch"] for kernel in fused["kernels"]} == {10 * major + minor}
    assert all(kernel["has_machine_code"] for kernel in fused["kernels"])
    assert fused["counts"]["launches_by_name"] == {"aten::ones_like": 1} | dict.fromkeys(
        (kernel["name"] for kernel in fused["kernels"]), 1
    )
    assert fused["num_kernels"] == 2  # one forward, one backward
    # forward: x, y, out. backward: x, y, gradient of out, of x, of y.
    assert fused["counts"]["elementwise_bytes"] == pytest.approx(9 * size, rel=0.2)
    assert eager["counts"]["elementwise_bytes"] > 1.5 * fused["counts"]["elementwise_bytes"]
    assert not eager["counts"]["waits"] and not fused["counts"]["waits"]


def test_waits_of_the_host_are_counted(on_a_t4):
    assert on_a_t4[2] == ["aten::_local_scalar_dense", "aten::_to_copy to the host", "aten::_to_copy to the host"]
