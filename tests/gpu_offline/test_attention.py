"""Flex attention compiled for real GPUs, forward and backward: it compiles, it fits, and it is compiled few times."""

import itertools
from typing import Any

import pytest

from tests.gpu_offline.fake_cuda import GPUS
from tests.gpu_offline.faked import run_faked

pytestmark = pytest.mark.long

WORK = "tests.gpu_offline.work_attention:run"
NAMES = ("num_heads", "num_kv_heads", "width", "num_positions", "num_contexts", "dtype")
SHAPES = [(32, 8, 128), (64, 8, 128), (4, 2, 16)]
ALL = [
    (*shape, positions, contexts, dtype)
    for shape, positions, contexts, dtype in itertools.product(SHAPES, (20, 60, 1000), (0, 3), ("bfloat16", "float32"))
] + [(8, 4, 256, 300, 3, "bfloat16"), (8, 4, 256, 300, 0, "float32"), (12, 12, 64, 300, 0, "float16")]
# An 8B shape in training; wide rows on a GPU with little shared memory.
FEW = {
    "sm_90": [(32, 8, 128, 1000, 3, "bfloat16")],
    "sm_89": [(4, 2, 128, 60, 0, "float32")],
}


def call_of(shape: tuple) -> dict[str, Any]:
    return {"function": "compile_attention"} | dict(zip(NAMES, shape, strict=True))


def check(gpu: str, shapes: list[tuple], found_of_all: list[dict[str, Any]]) -> None:
    """Every shape compiled to machine code of that GPU that fits its shared memory, in three launches of kernels."""
    limit = GPUS[gpu].shared_memory_per_block_optin
    major, minor = GPUS[gpu].capability
    for shape, found in zip(shapes, found_of_all, strict=True):
        kernels = found["kernels"]
        assert kernels and all(kernel["has_machine_code"] for kernel in kernels), shape
        assert {kernel["arch"] for kernel in kernels} == {10 * major + minor}, shape
        too_large = [kernel for kernel in kernels if kernel["shared_bytes"] > limit]
        assert not too_large, (shape, too_large)
        launches = found["counts"]["launches_by_name"]
        attention = {name: number for name, number in launches.items() if "flex_attention" in name}
        assert sum(attention.values()) == 3, (shape, launches)  # forward; backward's sums of rows; backward
        assert not found["counts"]["waits"], shape


@pytest.fixture(scope="module")
def on_an_h100() -> list[Any]:
    """What one process found: FEW, the batches that were compiled, the error at the limit."""
    calls = [call_of(shape) for shape in FEW["sm_90"]]
    calls += [{"function": "count_compiles", "num_batches": 40, "seed": 0}, {"function": "exceed_recompilations"}]
    return run_faked(WORK, calls)


def test_attention_compiles_and_fits(on_an_h100):
    check("sm_90", FEW["sm_90"], on_an_h100[:-2])


def test_random_batches_of_every_placement_are_compiled_four_times_at_most(on_an_h100):
    assert 1 <= len(on_an_h100[-2]["compiled_at"]) <= 4, on_an_h100[-2]


def test_the_limit_of_recompilations_is_an_error(on_an_h100):
    assert "RecompileLimit" in on_an_h100[-1]


@pytest.mark.extended
def test_wide_rows_fit_a_small_gpu():
    check("sm_89", FEW["sm_89"], run_faked(WORK, [call_of(shape) for shape in FEW["sm_89"]], "sm_89"))


@pytest.mark.extended
@pytest.mark.parametrize("shape", sorted({shape[:3] for shape in ALL}))
@pytest.mark.parametrize("gpu", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"])
def test_attention_of_every_shape_compiles_and_fits(gpu, shape):
    shapes = [one for one in ALL if one[:3] == shape]
    check(gpu, shapes, run_faked(WORK, [call_of(one) for one in shapes], gpu, timeout_s=2400))
