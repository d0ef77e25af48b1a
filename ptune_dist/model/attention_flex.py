"""Attention over segments with torch's flex attention: ragged rows and shared keys in one kernel, nothing padded.

It is for CUDA, where the kernel is compiled once and skips blocks of keys that no query of a block reads. What it reads
is planned on the host (`flex_plan`).

Shapes: N live positions, X positions given from outside, Q and J places of queries and keys, H heads, G key/value
heads, D width of a head, R and C blocks of queries and keys, K intervals.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch._dynamo import mark_dynamic
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ptune_dist.model.attention import KeysValues, Segment
from ptune_dist.model.flex_plan import BLOCK, FlexPlan, plan_attention, unpack

# Never the kernel for few queries: where Inductor picks it and positions x heads / key/value heads exceed 128, it fails
# to compile.
KERNEL: Any = {"BACKEND": "TRITON"}
# What torch chooses for wide rows needs more shared memory than these GPUs have: 99 KiB a block, where an A100 has 163.
SMALL_GPUS = ((8, 6), (8, 9), (12, 0), (12, 1))  # compute capabilities
WIDE_ROW_BYTES = 512
SMALL_KERNEL = (
    KERNEL
    | {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1, "bwd_num_stages": 1}
    | {f"bwd_BLOCK_{axis}": 16 for axis in ("M1", "N1", "M2", "N2")}
)


@dataclass(frozen=True)
class FlexTables:
    """A plan on the device; the names and shapes are those of `FlexPlan`."""

    take_copies: torch.Tensor
    take_queries: torch.Tensor
    take_keys: torch.Tensor
    put_queries: torch.Tensor
    put_keys: torch.Tensor
    lows: torch.Tensor
    highs: torch.Tensor
    kv_num: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num: torch.Tensor
    full_kv_indices: torch.Tensor
    q_num: torch.Tensor
    q_indices: torch.Tensor
    full_q_num: torch.Tensor
    full_q_indices: torch.Tensor

    @classmethod
    def unpack(cls, flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> "FlexTables":
        """Views of what `FlexPlan.pack` gave, after its copy to the device."""
        tables = cls(**unpack(flat, shapes))
        if tables.lows.is_cuda:
            for table in tables.of_kernel():
                # The number of intervals alone is compiled in.
                mark_dynamic(table, [1] if table is tables.lows or table is tables.highs else list(range(table.dim())))
        return tables

    @classmethod
    def of(cls, plan: FlexPlan, device: torch.device) -> "FlexTables":
        """In one copy."""
        flat, shapes = plan.pack()
        return cls.unpack(torch.from_numpy(flat).to(device, non_blocking=True), shapes)

    @property
    def is_rearranged(self) -> bool:
        return len(self.take_queries) > 0

    def of_kernel(self) -> list[torch.Tensor]:
        """Those that `attend_blocks` takes, in its order."""
        return [getattr(self, field.name) for field in fields(self)[5:]]


class FlexSegments:
    """Any segments, over any keys/values given from outside."""

    def __init__(
        self,
        segments: list[Segment],
        outside: list[KeysValues],
        device: torch.device,
        tables: Mapping[int | None, FlexTables] | None = None,
    ):
        """`tables`: of the layers' windows, where they were prepared; others are made when a layer asks for them."""
        self._segments = segments
        self._outside = outside
        self._device = device
        self._tables = dict(tables or {})

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int | None
    ) -> torch.Tensor:
        """q [N, H, D], k and v [N, G, D] -> [N, H, D]."""
        tables = self._tables_of(window)
        if len(self._segments) > 1:  # what is not a number in one segment must not reach another
            k = Cleaned.run(k)
            v = Cleaned.run(v)
        if self._outside:
            k = torch.cat([*(part.keys[layer] for part in self._outside), k])
            v = torch.cat([*(part.values[layer] for part in self._outside), v])
        if len(tables.take_copies):
            k = WithCopies.run(k, tables.take_copies)
            v = WithCopies.run(v, tables.take_copies)
        if not tables.is_rearranged:
            return run_flex(q, k, v, tables, scale)
        q = Moved.run(q, tables.take_queries, tables.put_queries)
        k = Moved.run(k, tables.take_keys, tables.put_keys)
        v = Moved.run(v, tables.take_keys, tables.put_keys)
        return Moved.run(run_flex(q, k, v, tables, scale), tables.put_queries, tables.take_queries)

    def _tables_of(self, window: int | None) -> FlexTables:
        if window not in self._tables:
            plan = plan_attention(self._segments, [part.length for part in self._outside], window)
            self._tables[window] = FlexTables.of(plan, self._device)
        return self._tables[window]


class Cleaned(torch.autograd.Function):
    """Zeros for what is not finite. Unlike `nan_to_num` it keeps nothing for backward: gradients pass unchanged."""

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.nan_to_num(0.0, 0.0, 0.0)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient

    @classmethod
    def run(cls, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, cls.apply(x))


class WithCopies(torch.autograd.Function):
    """Rows [take, x] for take [C, P]. In backward the gradients of the copies are added up in float32.

    Places that pad a copy repeat its last row; nothing reads them, so their gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, take: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(take)
        return torch.cat([x.index_select(0, take.flatten()), x])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (take,) = ctx.saved_tensors
        copies, own = gradient.tensor_split([take.numel()])
        added = copies.unflatten(0, take.shape).sum(0, dtype=torch.float32).to(own.dtype)
        return own.index_add(0, take[0], added), None

    @classmethod
    def run(cls, x: torch.Tensor, take: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, cls.apply(x, take))


class Moved(torch.autograd.Function):
    """x[take]; in backward a gather too, gradient[put], where the gradient of an index would add up atomically.

    Rows that `take` repeats for padding get no gradient of their own: nothing reads them as keys, and as queries they
    read nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, take: torch.Tensor, put: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(put)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (put,) = ctx.saved_tensors
        return gradient.index_select(0, put), None, None

    @classmethod
    def run(cls, x: torch.Tensor, take: torch.Tensor, put: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, cls.apply(x, take, put))


def run_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: FlexTables, scale: float) -> torch.Tensor:
    """q [Q, H, D], k and v [J, G, D] -> [Q, H, D]; compiled on CUDA."""
    if not q.is_cuda:
        return attend_blocks(q, k, v, tables.of_kernel(), scale)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_gradient:  # it is compiled anew for every other set of inputs that need one: let it always be all of them
        q, k, v = (t if t.requires_grad else t.detach().requires_grad_() for t in (q, k, v))
    for tensor in (q, k, v):
        mark_dynamic(tensor, 0)
    width = max(q.shape[-1], v.shape[-1])
    padded_width = 1 << (width - 1).bit_length()  # of a head, in the kernel
    is_wide = padded_width * q.element_size() >= WIDE_ROW_BYTES
    options = {"is_small": True} if is_wide and torch.cuda.get_device_capability() in SMALL_GPUS else {}
    with torch.set_grad_enabled(needs_gradient):
        return compiled_attend_blocks()(q, k, v, tables.of_kernel(), scale, **options)


@functools.cache
def compiled_attend_blocks() -> Callable[..., torch.Tensor]:
    """For all lengths. It raises at the limit of recompilations, where torch would run on without a kernel."""
    return torch.compile(attend_blocks, fullgraph=True)


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: list[torch.Tensor],
    scale: float,
    *,
    is_small: bool = False,
) -> torch.Tensor:
    """q [Q, H, D], k and v [J, G, D] -> [Q, H, D]; `tables`: `FlexTables.of_kernel`. `is_small`: takes less memory."""
    lows, highs, *blocks = tables
    kernel = SMALL_KERNEL if is_small else KERNEL
    sizes = (q.shape[0], k.shape[0])
    rows = [table[None, None] for table in blocks]
    mask = BlockMask(sizes, *rows, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=build_reads(lows, highs))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=kernel)
    return cast(torch.Tensor, out).squeeze(0).transpose(0, 1)


def build_reads(lows: torch.Tensor, highs: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Flex attention's mask function. It closes over tensors only: the compiled kernel would depend on all else."""
    ends = [(lows[i], highs[i]) for i in range(lows.shape[0])]

    def reads(_b: torch.Tensor, _h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        found = [(key >= low[query]) & (key < high[query]) for low, high in ends]
        return functools.reduce(torch.bitwise_or, found)

    return reads
