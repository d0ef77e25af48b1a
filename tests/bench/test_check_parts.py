"""What the parts of launch/gpu_check.sh read from traces and logs."""

import json
import subprocess
import sys
import time

import pytest
import torch

from ptune_dist.bench.check.gpu_tests import count_ends
from ptune_dist.bench.check.kernels import group_of, read_trace
from ptune_dist.bench.check.recompiles import ENVIRONMENT, read_recompiles
from ptune_dist.bench.check.sharded import read_nccl
from ptune_dist.bench.work import PEAK_ROWS, products_per_s
from ptune_dist.config.load import load_config
from tests.commands import run_module
from tests.processes import ROOT, process_env


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}


GPU_TRACE = [
    {"ph": "M", "name": "process_name"},
    event("cpu_op", "aten::mm", 0, 50),
    event("cpu_op", "aten::_local_scalar_dense", 3900, 90),
    event("cuda_runtime", "cudaLaunchKernel", 10, 5),
    event("cuda_runtime", "cudaLaunchKernelExC", 20, 5),
    event("cuda_driver", "cuLaunchKernel", 30, 5),
    event("cuda_runtime", "cudaStreamSynchronize", 3910, 80),
    event("kernel", "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", 1000, 1000),
    event("kernel", "triton_tem_fused_flex_attention_0", 2000, 500),
    event("kernel", "ncclDevKernel_AllGather_RING_LL", 1500, 1000, tid=2),  # beside the product, on its own stream
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 3000, 1000),
]


def test_a_gpu_trace_is_grouped_with_idle_time_launches_and_waits():
    found = read_trace(GPU_TRACE, num_steps=2, num_layers=3)
    expected = {"products": 0.5, "attention": 0.25, "between GPUs": 0.5, "copies": 0.5, "idle": 0.25}
    assert found["device"] == "gpu" and found["groups_ms"] == pytest.approx(expected)
    assert found["step_ms"] == pytest.approx(1.5)  # 3 ms of the device, two steps
    assert found["launches_per_step"] == 1.5 and found["launches_per_layer"] == 0.5
    assert found["host_waits_per_step"] == 0.5 and found["host_reads_per_step"] == 0.5
    assert found["waits"] == {"cudaStreamSynchronize": 0.5, "aten::_local_scalar_dense": 0.5}
    assert found["longest"][0]["ms"] == 0.5 and found["longest"][0]["calls"] == 0.5


def test_without_a_gpu_an_operator_counts_without_those_that_it_calls():
    trace = [
        event("cpu_op", "aten::linear", 0, 100),
        event("cpu_op", "aten::mm", 10, 80),
        event("cpu_op", "aten::copy_", 20, 30),
        event("cpu_op", "aten::copy_", 25, 50, tid=2),  # of another thread
        event("cpu_op", "aten::add", 200, 40),
    ]
    found = read_trace(trace, num_steps=1, num_layers=1)
    assert found["device"] == "cpu" and found["step_ms"] == pytest.approx(0.24)
    expected = {"products": 0.07, "copies": 0.08, "elementwise": 0.04, "idle": 0.0}
    assert found["groups_ms"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>", "products"),
        ("triton_tem_fused_mm_3", "products"),
        ("triton_tem_fused_flex_attention_backward_7", "attention"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "between GPUs"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1", "norms"),
        ("triton_poi_fused_mul_silu_2", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::index_elementwise_kernel<128, 4>", "indexing"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>", "cross entropy"),
        ("something_else", "other"),
    ],
)
def test_kernels_belong_to_groups(name, group):
    assert group_of(name) == group


RECOMPILING = """
import torch
add = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
for size in range(2, 16):
    add(torch.ones(size))
"""


@pytest.mark.long
def test_recompilations_and_the_limit_are_read_from_the_log_of_this_torch():
    done = subprocess.run(
        [sys.executable, "-c", RECOMPILING], env=process_env(ENVIRONMENT), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = read_recompiles(done.stderr.splitlines())
    limit = torch._dynamo.config.recompile_limit  # the log names one more attempt, which is not compiled
    assert found == {"recompiles": limit, "recompiles_of": {"<lambda>": limit}, "limit_hits": 1}


NCCL_LOG = """\
gpu:1:1 [0] NCCL INFO cudaDriverVersion 13000
gpu:1:1 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
gpu:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
gpu:1:9 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM/read
gpu:1:9 [1] NCCL INFO Channel 00/0 : 1[1] -> 0[0] via SHM/direct/direct
gpu:1:9 [1] NCCL WARN Cuda failure 'out of memory'
"""


def test_links_and_warnings_are_read_from_nccls_log():
    assert read_nccl(NCCL_LOG.splitlines()) == {
        "nccl_version": "2.28.9+cuda13.0",
        "nccl_links": {"P2P/CUMEM/read": 2, "SHM/direct/direct": 1},
        "nccl_warnings": ["Cuda failure 'out of memory'"],
    }
    assert read_nccl(["no NCCL here"]) == {"nccl_version": "", "nccl_links": {}, "nccl_warnings": []}


TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("value", ["one two", "three"])
def test_passes(value):
    open("JOURNAL", "a").write(value + ",")

@pytest.mark.gpu
def test_fails():
    assert "expected" == "found"

@pytest.mark.gpu
def test_last():
    pass

def test_needs_no_gpu():
    open("JOURNAL", "a").write("no gpu,")
"""


def test_gpu_tests_are_counted_and_what_has_passed_before_is_not_repeated(tmp_path):
    (tmp_path / "test_one.py").write_text(TESTS.replace("JOURNAL", str(tmp_path / "journal")))
    (tmp_path / "test_other.py").write_text("raise RuntimeError('collected')")
    result = tmp_path / "result.json"
    before = tmp_path / "before.json"
    before.write_text("{}")
    module = [sys.executable, "-m", "ptune_dist.bench.check.gpu_tests"]
    command = [*module, "--result", result, "--before", before, "--tests", ".", "--rootdir", "."]
    done = subprocess.run(command, env=process_env(), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stdout.index("'expected' == 'found'") < done.stdout.index("test_last PASSED")  # a run may be cut off
    found = json.loads(result.read_text())
    assert (found["passed"], found["failed"], found["skipped"], found["exit_status"]) == (3, 1, 0, 1)
    assert [name.rpartition("::")[2] for name in found["failed_tests"]] == ["test_fails"]
    assert (tmp_path / "journal").read_text() == "one two,three,"

    before.write_text(result.read_text())
    assert subprocess.run([*command, "-k", "passes"], env=process_env(), cwd=tmp_path).returncode == 0
    assert json.loads(result.read_text())["passed"] == 3
    assert (tmp_path / "journal").read_text() == "one two,three,"


def test_a_test_that_ends_in_an_error_has_failed():
    found = count_ends({"a::one": "PASSED", "a::two": "ERROR", "a::three": "SKIPPED"})
    assert (found["passed"], found["failed"], found["skipped"], found["failed_tests"]) == (1, 1, 1, ["a::two"])


NEEDS_MEMORY = """
import sys
rows = int(sys.argv[1])
print("trying", rows, file=open("JOURNAL", "a"))
if rows > 4:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
if sys.argv[2] == "bad":
    sys.exit("something else")
"""


def test_rows_are_halved_until_they_fit_and_remembered(tmp_path):
    journal = tmp_path / "journal"
    script = tmp_path / "script.py"
    script.write_text(NEEDS_MEMORY.replace("JOURNAL", str(journal)))
    remembered = tmp_path / "rows.txt"
    options = ["--rows", "16", "--remember", str(remembered), "--", sys.executable, str(script), "ROWS"]
    done = run_module("ptune_dist.bench.halving", *options, "good")
    assert done.returncode == 0 and "out of memory with 16 rows: trying 8" in done.stdout
    assert journal.read_text() == "trying 16\ntrying 8\ntrying 4\n" and remembered.read_text() == "4"
    done = run_module("ptune_dist.bench.halving", *options, "bad")  # an error of another kind is not tried again
    assert done.returncode == 1 and journal.read_text().endswith("trying 4\ntrying 4\n")


def test_the_rate_of_products_is_a_mean_over_the_time_given_on_as_many_rows_as_training_has():
    assert PEAK_ROWS["cuda"] == load_config(ROOT / "configs/bench/gpu_run.yaml").train.micro_batch_tokens
    x = torch.randn(64, 32)
    w = torch.randn(48, 32)
    out = torch.zeros(64, 48)
    began = time.perf_counter()
    rate = products_per_s(x, w, out, 0.2, per_timing=3)
    elapsed = time.perf_counter() - began
    assert torch.equal(out, x @ w.T)
    assert elapsed >= 0.2
    assert rate * elapsed >= 3 and round(rate * elapsed) >= round(rate * 0.2)
