"""Count what a pass asks of the GPU: launches, bytes moved, host synchronizations, copies between host and GPU.

For processes of `faked.run_faked`, on fake tensors. Operations that torch runs one by one and kernels that Inductor
compiled are both counted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch._guards import TracingContext
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from tests.gpu_offline import fake_cuda

aten: Any = torch.ops.aten
# The size of what these return is known on the GPU only.
DATA_DEPENDENT = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
)
# Library kernels whose bytes are those of a matrix product, not of elementwise work.
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_int_mm", "aten::_scaled_mm")
ONLY_VIEWS = ("aten::detach", "aten::_unsafe_view")  # their schemas say otherwise
ALLOCATIONS = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")


@dataclass
class Counts:
    """What a pass asked of the GPU. Bytes: inputs and outputs of an operation, each once, as if without caches."""

    launches: int = 0
    product_launches: int = 0
    elementwise_bytes: int = 0
    product_bytes: int = 0
    uploads: int = 0  # copies from the host
    waits: list[str] = field(default_factory=list)  # operations for which the host must wait for the GPU
    launches_by_name: dict[str, int] = field(default_factory=dict)
    bytes_by_name: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, num_bytes: int) -> None:
        self.launches += 1
        self.launches_by_name[name] = self.launches_by_name.get(name, 0) + 1
        self.bytes_by_name[name] = self.bytes_by_name.get(name, 0) + num_bytes
        if name in PRODUCTS:
            self.product_launches += 1
            self.product_bytes += num_bytes
        else:
            self.elementwise_bytes += num_bytes


class CountingFakeTensors(FakeTensorMode):
    """Makes fake tensors and counts operations on those on CUDA, a backward pass included, but not a compiler's."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.counts = Counts()
        self._is_inside = False  # an operation may be made of others

    @property
    def avoid_device_init(self) -> bool:
        """Real tensors are not copied to the GPU, as they would be to know their values later."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_inside or TracingContext.try_get() is not None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name
        if name == "aten::_pin_memory":  # fake tensors have none; a copy on the host is no wait
            return args[0]
        inputs = cuda_tensors(args, kwargs)
        if inputs and waits_for_value(name, args, kwargs):
            self.counts.waits.append(name)
        if inputs and name == "aten::_local_scalar_dense":
            return 1.0 if args[0].dtype.is_floating_point else 1  # a fake tensor has no value
        self._is_inside = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._is_inside = False
        self._count(func, name, inputs, result)
        return result

    def _count(self, func: Any, name: str, inputs: list[torch.Tensor], result: Any) -> None:
        outputs = cuda_tensors(result)
        if inputs and not outputs and copies_to_host(result):
            self.counts.waits.append(f"{name} to the host")
        elif outputs and not inputs and name in ("aten::_to_copy", "aten::copy_"):
            self.counts.uploads += 1
        elif outputs and not func.is_view and name not in (*ONLY_VIEWS, *ALLOCATIONS):
            known = {id(tensor): tensor for tensor in inputs + outputs}
            self.counts.add(name, sum(size_of(tensor) for tensor in known.values()))


def cuda_tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]


def copies_to_host(result: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(result))


def waits_for_value(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "aten::index":  # a mask as an index
        return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:]))
    return name in DATA_DEPENDENT


def size_of(tensor: torch.Tensor) -> int:
    return int(tensor.numel()) * tensor.element_size()


@contextmanager
def fake_tensors() -> Iterator[CountingFakeTensors]:
    """All tensors made inside are fake: a shape, a dtype and a device, no memory."""
    with CountingFakeTensors() as mode:
        yield mode


def report(work: Callable[[], Any], mode: CountingFakeTensors) -> dict[str, Any]:
    """Call `work`, inside `fake_tensors`, and say for JSON what it asked of the GPU and which kernels were compiled."""
    mode.counts = Counts()
    num_compiled = len(fake_cuda.compiled)
    num_launches = len(fake_cuda.launches)
    work()
    for launch in fake_cuda.launches[num_launches:]:
        mode.counts.add(launch.name, launch.num_bytes)
    kernels = [asdict(kernel) for kernel in fake_cuda.compiled[num_compiled:]]
    return {"counts": asdict(mode.counts), "kernels": kernels, "num_kernels": len({k["name"] for k in kernels})}
