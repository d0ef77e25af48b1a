"""The segment attention compiled for a GPU, forward and backward."""

from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

from ptune_dist.data.batches import Batch
from ptune_dist.model.attention import KeysValues, Segment
from ptune_dist.model.attention_flex import FlexSegments
from ptune_dist.model.layout import Before, Outside
from ptune_dist.model.layout import lay_out as lay_out_batch
from tests.gpu_offline import fake_cuda
from tests.gpu_offline.counting import fake_tensors, report

PLACEMENTS = ("prefix", "infix", "template")


def run(function: str, **settings: Any) -> Any:
    """One of the functions of this module: several of them can share a process."""
    return globals()[function](**settings)


def lay_out(num_positions: int, num_contexts: int) -> tuple[list[Segment], list[int]]:
    """Shared virtual tokens and rows behind them; or rows over contexts of 40 positions each."""
    size = max(1, num_positions // 5)
    if num_contexts:
        ends = list(range(0, num_positions, size))
        named = [(number % num_contexts,) for number in range(len(ends))]
        return [
            Segment(start, min(size, num_positions - start), contexts, (), 40)
            for start, contexts in zip(ends, named, strict=True)
        ], [40] * num_contexts
    virtual = Segment(0, size)
    rows = range(size, num_positions, size)
    read = ((0, size),)
    return [virtual, *(Segment(start, min(size, num_positions - start), (), read, size) for start in rows)], []


def compile_attention(
    num_heads: int, num_kv_heads: int, width: int, num_positions: int, num_contexts: int, dtype: str
) -> dict[str, Any]:
    """One layer's attention, forward and backward."""
    torch._dynamo.reset()
    device = torch.device("cuda", 0)
    segments, lengths = lay_out(num_positions, num_contexts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=getattr(torch, dtype), device=device, requires_grad=True)

    with fake_tensors() as mode:
        outside = [KeysValues(*(draw(1, length, num_kv_heads, width) for _ in range(2))) for length in lengths]
        q = draw(num_positions, num_heads, width)
        k, v = (draw(num_positions, num_kv_heads, width) for _ in range(2))
        attention = FlexSegments(segments, outside, device)
        return report(lambda: attention.attend(q, k, v, layer=0, scale=0.1, window=None).sum().backward(), mode)


def count_compiles(num_batches: int, seed: int) -> dict[str, Any]:
    """How often the attention is compiled for random batches of every placement, and for which of them."""
    torch._dynamo.reset()
    fake_cuda.skip_machine_code()
    rng = np.random.default_rng(seed)
    compiled_at: list[str] = []
    counters.clear()
    with fake_tensors():
        for number in range(num_batches):
            placement = PLACEMENTS[number % len(PLACEMENTS)]
            before = counters["stats"]["unique_graphs"]
            attend_once(*draw_pass(rng, placement), window=[None, 16][int(rng.integers(2))], trains=number % 3 > 0)
            compiled_at += [f"{number}: {placement}"] * (counters["stats"]["unique_graphs"] - before)
    return {"compiled_at": compiled_at}


def draw_pass(rng: np.random.Generator, placement: str) -> tuple[list[Segment], list[int]]:
    """Segments of a random batch of 1 to 3 members, perhaps with prefix keys/values, and the lengths from outside."""
    num_rows, num_members = (int(n) for n in rng.integers(1, [9, 4]))

    def draw_texts(longest: int) -> list[np.ndarray]:
        return [np.arange(n, dtype=np.int32) for n in rng.integers(1, longest, num_rows)]

    contexts = [np.zeros(0, np.int32)] * num_rows if placement == "prefix" else draw_texts(200)
    readers = [(row, member) for row in range(num_rows) for member in range(num_members) if rng.random() < 0.8]
    readers = readers or [(0, 0)]
    batch = Batch(contexts, draw_texts(150), draw_texts(9), readers, 0)
    lengths: list[int] = []
    members, rows = [], []
    has_prefix = rng.random() < 0.5
    for _ in range(num_members):
        members.append(Before((len(lengths),), 7) if has_prefix else Before())
        lengths += [7] if has_prefix else []
    lead = min(map(len, contexts))
    if lead:
        lengths.append(lead)
    for context in contexts:
        own = len(context) - lead
        rows.append(
            Before((*([num_members * has_prefix] if lead else []), *([len(lengths)] if own else [])), len(context))
        )
        lengths += [own] if own else []
    num_virtual = [0 if has_prefix else 5] * num_members
    return lay_out_batch(batch, num_virtual, Outside([], rows, members)).segments, lengths


def attend_once(segments: list[Segment], lengths: list[int], *, window: int | None, trains: bool) -> None:
    """One layer of a tiny shape."""
    num_positions = sum(segment.length for segment in segments)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda", requires_grad=trains)

    outside = [KeysValues(draw(1, length, 2, 16), draw(1, length, 2, 16)) for length in lengths]
    q = draw(num_positions, 4, 16)
    k, v = (draw(num_positions, 2, 16) for _ in range(2))
    out = FlexSegments(segments, outside, q.device).attend(q, k, v, layer=0, scale=0.1, window=window)
    assert out.shape == q.shape and out.requires_grad == trains
    if trains:
        out.sum().backward()


def exceed_recompilations() -> str:
    """The error of a pass that would have to be compiled once more than torch allows."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 1
    fake_cuda.skip_machine_code()
    message = "none"
    with fake_tensors():
        attend_once([Segment(0, 200)], [], window=None, trains=False)
        try:
            attend_once([Segment(0, 200)], [], window=None, trains=True)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
    torch._dynamo.config.recompile_limit = 8
    return message
