"""A layer of an 8B moves few bytes, in few kernels that are compiled once, for the architecture asked for."""

import pytest

from tests.gpu_offline.faked import run_faked

pytestmark = [pytest.mark.long, pytest.mark.extended]

WORK = "tests.gpu_offline.work_layer:run_layer"
LENGTHS = [8192, 4096, 640, 20]
CEILING = 4.2e9  # bytes of elementwise work at 8,192 positions, forward and backward


@pytest.fixture(scope="module")
def layers():
    calls = [
        {"is_merged": False, "is_fused": False, "lengths": [8192]},
        {"is_merged": True, "is_fused": False, "lengths": [8192]},
        {"is_merged": True, "is_fused": True, "lengths": [*LENGTHS, 8192]},
        {"is_merged": False, "is_fused": True, "lengths": [8192]},
    ]
    return run_faked(WORK, calls)


def test_a_fused_layer_moves_few_bytes(layers):
    eager, merged, fused, unmerged = (layer["counts"] for layer in layers)
    assert layers[2]["fallback"] is None and layers[3]["fallback"] is None
    assert unmerged["elementwise_bytes"] < 1.2 * CEILING
    assert fused["elementwise_bytes"] < CEILING < min(eager["elementwise_bytes"], merged["elementwise_bytes"])
    assert fused["launches"] < merged["launches"] < eager["launches"]
    assert fused["product_launches"] == 8  # qkv, o, gate_up, down: forward, and the gradient of the input
    assert not fused["waits"]


def test_a_kernel_is_compiled_once_for_all_lengths(layers):
    kernels = layers[2]["kernels"]
    assert all(kernel["arch"] == 90 and kernel["has_machine_code"] for kernel in kernels)
    assert all(kernel["shared_bytes"] <= 227 << 10 for kernel in kernels)
    # Norm and gated activation: one each way. Rotary: queries and keys.
    assert len({kernel["name"] for kernel in kernels}) <= 8
