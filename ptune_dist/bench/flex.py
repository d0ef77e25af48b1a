"""Measure one layer's flex attention on a GPU over rows that share virtual tokens, with and without copies of these.

    python -m ptune_dist.bench.flex [--readers 0 256 512 1024] [--rows 224 4000] [--positions 8192] --result FILE

The shape is Llama 3.1 8B's, in bfloat16. `--readers`: values of `flex_copies.READERS_OF_COPY`, where 0 is no copies.
For each the result has the milliseconds of forward and backward, and how far output and gradients are from those of
float32 without copies (`error_*`: norm of the difference over the norm), which must not depend on the copies.
"""

import argparse
import statistics
import sys
from typing import Any

import torch

from ptune_dist.bench.probe import write_result
from ptune_dist.model import flex_copies
from ptune_dist.model.attention import KeysValues, Segment
from ptune_dist.model.attention_flex import FlexSegments, FlexTables
from ptune_dist.model.flex_plan import plan_attention

NUM_VIRTUAL = 100
HEADS, KV_HEADS, WIDTH = 32, 8, 128
NUM_REPEATS = 15
NUM_WARM_UP = 3
NAMES = ("out", "q", "k", "v", "prefix_k", "prefix_v")


def build_segments(num_positions: int, row: int, is_outside: bool) -> list[Segment]:
    """Rows of `row` positions behind shared virtual tokens, which are live positions or come from outside."""
    if is_outside:
        return [Segment(start, row, (0,), (), NUM_VIRTUAL) for start in range(0, num_positions - row + 1, row)]
    parents = ((0, NUM_VIRTUAL),)
    starts = range(NUM_VIRTUAL, num_positions - row + 1, row)
    return [Segment(0, NUM_VIRTUAL), *(Segment(start, row, (), parents, NUM_VIRTUAL) for start in starts)]


def draw_tensors(num_live: int, is_outside: bool, device: torch.device) -> list[torch.Tensor]:
    """Random q, k, v and the gradient of the output [N, heads, width], and perhaps prefix keys and values."""
    torch.manual_seed(0)
    shapes = [(num_live, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    shapes += [(1, NUM_VIRTUAL, KV_HEADS, WIDTH)] * 2 * is_outside
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]


def measure(
    segments: list[Segment], tensors: list[torch.Tensor], num_calls: int = NUM_WARM_UP + NUM_REPEATS
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Median milliseconds, and the output with all gradients."""
    q, k, v, gradient, *prefix = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *prefix)]
    outside = [KeysValues(*leaves[3:])] if prefix else []
    tables = FlexTables.of(plan_attention(segments, [part.length for part in outside]), q.device)
    attention = FlexSegments(segments, outside, q.device, {None: tables})
    found: list[torch.Tensor] = []
    times: list[list[float]] = [[], []]
    for _ in range(num_calls):
        moments = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        moments[0].record()
        out = attention.attend(*leaves[:3], layer=0, scale=WIDTH**-0.5, window=None)
        moments[1].record()
        found = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
        moments[2].record()
        torch.cuda.synchronize()
        for kind, begin, end in zip(times, moments[:-1], moments[1:], strict=True):
            kind.append(begin.elapsed_time(end))
    forward, backward = (statistics.median(kind[-NUM_REPEATS:]) for kind in times)
    return {"copies": len(tables.take_copies), "forward_ms": forward, "backward_ms": backward}, found


def compare(num_positions: int, row: int, is_outside: bool, settings: list[int]) -> dict[str, Any]:
    """The figures of every setting, by its name."""
    segments = build_segments(num_positions, row, is_outside)
    tensors = draw_tensors(segments[-1].start + row, is_outside, torch.device("cuda"))
    flex_copies.READERS_OF_COPY = 0
    wanted = measure(segments, [tensor.float() for tensor in tensors], num_calls=1)[1]
    figures: dict[str, Any] = {}
    for readers in settings:
        flex_copies.READERS_OF_COPY = readers
        own, found = measure(segments, tensors)
        for name, ours, theirs in zip(NAMES, found, wanted, strict=False):
            own[f"error_{name}"] = ((ours.float() - theirs).norm() / theirs.norm()).item()
        figures[f"readers_{readers}"] = own
        print(num_positions, row, "outside" if is_outside else "live", readers, own, flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, nargs="+", default=[0, 256, 512, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[224, 4000])
    parser.add_argument("--positions", type=int, nargs="+", default=[8192])
    parser.add_argument("--result", required=True)
    args = parser.parse_args()
    result = {
        f"{positions}_{row}_{'outside' if is_outside else 'live'}": compare(positions, row, is_outside, args.readers)
        for positions in args.positions
        for row in args.rows
        for is_outside in (False, True)
    }
    write_result(args.result, {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
