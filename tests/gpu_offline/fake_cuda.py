"""Pretend to have a GPU, so that Dynamo, AOTAutograd, Inductor and Triton compile for it and nothing is launched.

It works with fake tensors (`counting.fake_tensors`), in a CPU build of torch with the `triton` package. `pretend` must
run before torch is imported: `faked.run_faked` starts such a process. Kernels are compiled to machine code by Triton's
own compiler; `compiled` lists them with what they need of the GPU, and `launches` lists every launch.
"""

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GPU:
    """What torch's `get_device_properties` says of a GPU: the attributes that torch's compiler reads."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_block_optin: int  # bytes that one block may use: the limit for a kernel
    total_memory: int
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    shared_memory_per_block: int = 49152
    L2_cache_size: int = 50 << 20
    gcnArchName: str = ""
    clock_rate: int = 1_980_000
    memory_clock_rate: int = 2_619_000
    memory_bus_width: int = 5120

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        return self.shared_memory_per_block_optin + 1024

    @property
    def capability(self) -> tuple[int, int]:
        return self.major, self.minor


# NVIDIA's CUDA programming guide, table "technical specifications per compute capability".
GPUS = {
    "sm_75": GPU("Tesla T4", 7, 5, 40, 64 << 10, 15 << 30, max_threads_per_multi_processor=1024),
    "sm_80": GPU("NVIDIA A100-SXM4-80GB", 8, 0, 108, 163 << 10, 80 << 30),
    "sm_86": GPU("NVIDIA A10", 8, 6, 72, 99 << 10, 22 << 30, max_threads_per_multi_processor=1536),
    "sm_89": GPU("NVIDIA L40S", 8, 9, 142, 99 << 10, 45 << 30, max_threads_per_multi_processor=1536),
    "sm_90": GPU("NVIDIA H100 80GB HBM3", 9, 0, 132, 227 << 10, 80 << 30),
    "sm_100": GPU("NVIDIA B200", 10, 0, 148, 227 << 10, 180 << 30),
}


@dataclass(frozen=True)
class Kernel:
    """One configuration of a kernel; Inductor may compile several and time them on the GPU."""

    name: str
    arch: int
    shared_bytes: int
    num_warps: int
    has_machine_code: bool


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel; `num_bytes`: of the tensors that it is given, each read or written once."""

    name: str
    num_bytes: int


compiled: list[Kernel] = []
launches: list[Launch] = []


def pretend(gpu: str) -> None:
    """From now on this process has a GPU of that architecture."""
    open_libraries()
    properties = GPUS[gpu]
    fake_torch(properties)
    fake_triton(properties)
    fake_dynamo(properties)
    fake_inductor()


def open_libraries() -> None:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    of_torch = Path(found.origin).parent / "lib"
    own = Path(os.environ["PTUNE_FAKE_CUDA_LIBRARIES"])
    names = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
    for path in (own / "accelerator.so", *(of_torch / name for name in names), own / "guard.so"):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class NoGuard:
    """Instead of the context managers that change the current device."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> "NoGuard":
        return self

    def __exit__(self, *_: Any) -> bool:
        return False


def fake_torch(gpu: GPU) -> None:
    import torch

    torch.set_num_threads(1)
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda _device=None: gpu
    cuda.get_device_capability = lambda _device=None: gpu.capability
    cuda.get_device_name = lambda _device=None: gpu.name
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: False
    cuda.is_bf16_supported = lambda including_emulation=True: including_emulation or gpu.major >= 8
    cuda._lazy_init = lambda: None
    cuda.set_device = lambda _device: None
    cuda.synchronize = lambda _device=None: None
    cuda.device = cuda._DeviceGuard = NoGuard
    state = torch.zeros(16, dtype=torch.uint8)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda _device=None: state
        module.set_rng_state = lambda _state, _device=None: None
        module.get_rng_state_all = lambda: [state]
        module.set_rng_state_all = lambda _states: None
    private: Any = torch._C
    private._cuda_getCurrentRawStream = lambda _device: 0
    private._cuda_getDevice = lambda: 0
    private._cuda_getArchFlags = lambda: f"sm_{gpu.major}{gpu.minor}"
    # Inductor's code allocates and makes views with these; the originals do not know fake tensors.
    private._dynamo.guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: tensor.as_strided(
        size, stride, tensor.storage_offset() + offset
    )
    private._dynamo.guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    version: Any = torch.version
    version.cuda = "13.0"


def fake_triton(gpu: GPU) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Utils:
        @staticmethod
        def get_device_properties(_device: int) -> dict[str, int]:
            return {
                "max_shared_mem": gpu.shared_memory_per_block_optin,
                "multiprocessor_count": gpu.multi_processor_count,
                "max_num_regs": gpu.regs_per_multiprocessor,
                "warpSize": gpu.warp_size,
            }

    class Driver:
        utils = Utils
        launcher_cls = None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * gpu.major + gpu.minor, gpu.warp_size)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_benchmarker(self) -> None:
            return None

        def get_current_stream(self, _device: int = 0) -> int:
            return 0

        def map_python_to_cpp_type(self, name: str) -> str:
            return name

    triton.runtime.driver.set_active(Driver())


def fake_dynamo(gpu: GPU) -> None:
    import torch
    import torch._dynamo.device_interface as interfaces
    import torch._functorch.config as functorch

    interface: Any = interfaces.CudaInterface
    for name in ("current_device", "get_device_properties", "device_count"):
        setattr(interface, name, staticmethod(getattr(torch.cuda, name)))
    interface.get_raw_stream = staticmethod(lambda _device: 0)
    interface.is_available = staticmethod(lambda: True)
    interface.device = NoGuard
    interfaces.caching_worker_device_properties["cuda"] = [gpu]
    interfaces.caching_worker_current_devices["cuda"] = 0
    functorch.force_non_lazy_backward_lowering = True  # compile the backward pass with the forward pass


def fake_inductor() -> None:
    import torch._inductor.config as settings
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.misc_patterns as misc_patterns
    import torch._inductor.fx_passes.pad_mm as pad_mm
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.runtime.triton_heuristics as heuristics

    settings.compile_threads = 1
    settings.force_disable_caches = True
    settings.joint_graph_constant_folding = False  # computes constants on the GPU
    # These run example tensors on the GPU to learn patterns that are of no interest here.
    for module, name in (
        (fuse_attention, "_sfdp_init"),
        (joint_graph, "_sfdp_init"),
        (pad_mm, "_pad_mm_init"),
        (misc_patterns, "_misc_patterns_init"),
    ):
        if hasattr(module, name):
            setattr(module, name, lambda *_args, **_kwargs: None)
    helpers.set_driver_to_gpu = lambda: None
    tuner: Any = heuristics.CachingAutotuner
    tuner._make_launchers = note_kernels
    tuner._dynamic_scale_rblock = lambda _self: None
    tuner.run = note_launch
    heuristics.StaticTritonCompileResult.can_statically_launch = staticmethod(lambda *_args, **_kwargs: None)


def note_kernels(tuner: Any) -> None:
    """Instead of loading what was compiled onto the GPU."""
    for result in tuner.compile_results:
        kernel = result.kernel
        data = kernel.metadata
        name = tuner.inductor_meta.get("kernel_name") or tuner.fn.__name__
        compiled.append(Kernel(name, data.target.arch, data.shared, data.num_warps, "cubin" in kernel.asm))
    tuner.launchers = []


def note_launch(tuner: Any, *args: Any, stream: int, **_kwargs: Any) -> None:
    """Instead of a launch."""
    import torch

    if not tuner.compile_results:
        tuner.precompile()
    tensors = {id(arg): arg for arg in args if isinstance(arg, torch.Tensor)}
    num_bytes = sum(int(t.numel()) * t.element_size() for t in tensors.values())
    launches.append(Launch(tuner.inductor_meta.get("kernel_name") or tuner.fn.__name__, num_bytes))


def skip_machine_code() -> None:
    """From now on Triton compiles nothing: enough where only the number of Inductor's compilations counts."""
    import torch._inductor.runtime.triton_heuristics as heuristics

    heuristics.CachingAutotuner.precompile = lambda *_args, **_kwargs: None
