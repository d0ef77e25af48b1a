"""Flex attention compiled for real GPUs, forward and backward: it compiles, it fits, and it is compiled few times."""

import itertools
from typing import Any

import pytest

from tests.gpu_offline.fake_cuda import GPUS
from tests.gpu_offline.faked import run_faked

WORK = "tests.gpu_offline.work_attention"
NAMES = ("num_heads", "num_kv_heads", "width", "num_positions", "num_contexts", "dtype")
SHAPES = [(32, 8, 128), (64, 8, 128), (4, 2, 16)]
ALL = [
    (*shape, positions, contexts, dtype)
    for shape, positions, contexts, dtype in itertools.product(SHAPES, (20, 60, 1000), (0, 3), ("bfloat16", "float32"))
] + [(8, 4, 256, 300, 3, "bfloat16"), (8, 4, 256, 300, 0, "float32"), (12, 12, 64, 300, 0, "float16")]
# An 8B shape in training and with few positions, and the shape of the tests on a GPU.
FEW = {
    "sm_90": [(32, 8, 128, 1000, 3, "bfloat16"), (4, 2, 16, 20, 0, "float32")],
    "sm_89": [(4, 2, 128, 60, 0, "float32")],
}


def check(gpu: str, shapes: list[tuple]) -> None:
    """Every shape compiles to machine code of that GPU that fits its shared memory, in three launches of kernels."""
    calls: list[dict[str, Any]] = [dict(zip(NAMES, shape, strict=True)) for shape in shapes]
    limit = GPUS[gpu].shared_memory_per_block_optin
    major, minor = GPUS[gpu].capability
    for shape, found in zip(shapes, run_faked(f"{WORK}:compile_attention", calls, gpu, timeout_s=2400), strict=True):
        kernels = found["kernels"]
        assert kernels and all(kernel["has_machine_code"] for kernel in kernels), shape
        assert {kernel["arch"] for kernel in kernels} == {10 * major + minor}, shape
        shared = {kernel["name"]: kernel["shared_bytes"] for kernel in kernels}
        assert max(shared.values()) <= limit, (shape, shared)
        launches = found["counts"]["launches_by_name"]
        attention = {name: number for name, number in launches.items() if "flex_attention" in name}
        assert sum(attention.values()) == 3, (shape, launches)  # forward; backward's sums of rows; backward
        assert not found["counts"]["waits"], shape


@pytest.mark.long
@pytest.mark.parametrize("gpu", FEW)
def test_attention_compiles_and_fits(gpu):
    check(gpu, FEW[gpu])


@pytest.mark.extended
@pytest.mark.parametrize("shape", sorted({shape[:3] for shape in ALL}))
@pytest.mark.parametrize("gpu", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"])
def test_attention_of_every_shape_compiles_and_fits(gpu, shape):
    check(gpu, [one for one in ALL if one[:3] == shape])


@pytest.mark.long
def test_random_batches_of_every_placement_are_compiled_four_times_at_most():
    (found,) = run_faked(f"{WORK}:count_compiles", [{"num_batches": 40, "seed": 0}])
    assert 1 <= len(found["compiled_at"]) <= 4, found


def test_the_limit_of_recompilations_is_an_error():
    (message,) = run_faked(f"{WORK}:exceed_recompilations", [{}])
    assert "recompile_limit" in message
