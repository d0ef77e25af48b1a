"""int8 and fp8 on a GPU: the kernels compile within its limits, and a layer launches a handful and never waits."""

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.gpu_offline.fake_cuda import GPUS
from tests.gpu_offline.faked import run_faked
from tests.processes import ROOT, process_env

pytestmark = pytest.mark.long

WORK = "tests.gpu_offline.work_quantized"
SIZES = {"8B": (4096, 14336), "70B": (28672, 8192), "odd": (68, 33)}
IN_CI = ("sm_90",)


@pytest.mark.parametrize("gpu", [pytest.param(gpu, marks=[] if gpu in IN_CI else pytest.mark.extended) for gpu in GPUS])
def test_kernels_compile_within_a_gpus_shared_memory(gpu):
    has_fp8 = GPUS[gpu].capability >= (8, 9)
    common = {"dtype": "float16" if gpu == "sm_75" else "bfloat16", "with_fp8": has_fp8}
    cases = list(zip((1, 32, 256), SIZES.values(), strict=True))
    calls: list[dict[str, Any]] = [
        common | {"num_rows": num_rows, "num_inputs": inputs, "num_outputs": outputs}
        for num_rows, (inputs, outputs) in cases
    ]
    major, minor = GPUS[gpu].capability
    for compiled in run_faked(f"{WORK}:compile_kernels", calls, gpu):
        assert len(compiled) == (8 if has_fp8 else 6)
        for kernel in compiled:
            assert kernel["arch"] == 10 * major + minor and kernel["has_machine_code"], kernel
            # A product that is not rounded before something is added to it would round ties otherwise than torch.
            assert kernel["num_fused"] == 0 or kernel["name"] != "quantize_kernel", kernel
            assert kernel["shared"] <= GPUS[gpu].shared_memory_per_block_optin, kernel


def launched(counts: dict) -> dict[str, int]:
    return {name.partition("::")[2]: times for name, times in counts["launches_by_name"].items()}


def test_a_layer_launches_few_kernels_and_never_waits():
    big = [4096, 14336]
    narrow = [68, 33]  # widths that neither `_int_mm` nor `_scaled_mm` takes
    cases = [
        (8192, "bfloat16", False, big),
        (40, "bfloat16", True, big),
        (40, "float16", True, big),
        (8192, "float32", True, big),
        (6, "bfloat16", True, narrow),
        (1000, "bfloat16", True, narrow),
    ]
    calls = [
        {"kind": kind, "num_rows": num_rows, "dtype": dtype, "with_bias": with_bias, "sizes": sizes}
        for kind in ("int8", "int8_activations", "fp8")
        for num_rows, dtype, with_bias, sizes in cases
    ]
    keys = [(call["kind"], call["num_rows"], call["dtype"]) for call in calls]
    found = dict(zip(keys, run_faked(f"{WORK}:run_layer", calls), strict=True))
    for passes in found.values():
        assert not passes["forward"]["waits"] and not passes["backward"]["waits"]
        assert not passes["forward"]["uploads"] and not passes["backward"]["uploads"]
    many = {kind: found[kind, 8192, "bfloat16"] for kind in ("int8", "int8_activations", "fp8")}
    few = {dtype: found["int8", 40, dtype] for dtype in ("bfloat16", "float16")}
    dequantized = {"dequantize": 1, "mm": 1}
    assert launched(many["int8"]["forward"]) == launched(many["int8"]["backward"]) == dequantized
    for passes in few.values():
        assert launched(passes["forward"]) == {"multiply_int8": 1, "add_": 1}
    assert launched(few["bfloat16"]["backward"]) == {"multiply_int8": 1}
    assert launched(few["float16"]["backward"]) == dequantized  # scaled gradients may be too small for float16
    quantizing = {"quantize_activations": 1, "_int_mm": 1, "scale_sums": 1}
    assert launched(many["int8_activations"]["forward"]) == quantizing
    assert launched(many["int8_activations"]["backward"]) == launched(many["int8"]["backward"])
    assert launched(many["fp8"]["forward"]) == {"quantize_activations": 1, "_scaled_mm": 1}
    assert launched(many["fp8"]["backward"]) == {
        "quantize_activations": 1, "ones": 1, "transpose_bytes": 1, "_scaled_mm": 1,
    }  # fmt: skip
    weights = big[0] * big[1]
    for way in ("forward", "backward"):
        assert many["int8"][way]["elementwise_bytes"] == 3 * weights + 4 * big[1]  # int8 in, bfloat16 out, scales


def test_kernels_compute_what_torch_does():
    env = process_env({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}) | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.base.interpreted_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ) | env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "all kernels agree" in done.stdout, done.stderr[-3000:]
