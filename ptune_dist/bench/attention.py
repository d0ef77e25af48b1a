"""Measure the attention of one layer over rows that share their virtual tokens, forward and backward, on a CPU.

    python -m ptune_dist.bench.attention SIDE --heads 9 --kv-heads 3 --width 64 --tokens 30 --dtype bfloat16 \\
        --result FILE

SIDE: `fused` (torch's scaled-dot-product kernel) or `products` (two matrix products and a softmax).
"""

import argparse
import statistics
import sys
import time
from unittest import mock

import torch

from ptune_dist.bench.probe import write_result
from ptune_dist.model import attention
from ptune_dist.model.attention import CausalSegments, Segment

NUM_VIRTUAL = 20
NUM_POSITIONS = 1024  # of all rows together
NUM_REPEATS = 9
NUM_WARM_UP = 2
MOST_KEYS = {"fused": 0, "products": sys.maxsize}


def build_segments(num_tokens: int) -> list[Segment]:
    """The virtual tokens, once, and as many rows of `num_tokens` positions as make up NUM_POSITIONS."""
    rows = range(max(1, NUM_POSITIONS // num_tokens))
    parent = (0, NUM_VIRTUAL)
    return [
        Segment(0, NUM_VIRTUAL),
        *(Segment(NUM_VIRTUAL + row * num_tokens, num_tokens, (), (parent,), NUM_VIRTUAL) for row in rows),
    ]


def measure(segments: list[Segment], tensors: list[torch.Tensor]) -> dict[str, float]:
    """Median milliseconds; `tensors` are q [N, H, D], k and v [N, G, D]."""
    scale = tensors[0].shape[-1] ** -0.5
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(NUM_WARM_UP + NUM_REPEATS):
        layout = CausalSegments(segments, [], torch.device("cpu"))
        layout.attend(*tensors, layer=0, scale=scale, window=None)  # fills the buckets, once for all layers
        began = time.perf_counter()
        out = layout.attend(*tensors, layer=0, scale=scale, window=None)
        middle = time.perf_counter()
        torch.autograd.grad(out, tensors, out.detach())
        forward.append(1000 * (middle - began))
        backward.append(1000 * (time.perf_counter() - middle))
    found = {"forward_ms": statistics.median(forward[NUM_WARM_UP:])}
    found["backward_ms"] = statistics.median(backward[NUM_WARM_UP:])
    return found | {"total_ms": found["forward_ms"] + found["backward_ms"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=list(MOST_KEYS))
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--result", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    segments = build_segments(args.tokens)
    num_live = segments[-1].start + segments[-1].length
    tensors = [
        torch.randn(num_live, heads, args.width, dtype=getattr(torch, args.dtype), requires_grad=True)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]
    with mock.patch.object(attention, "most_keys_by_products", lambda *_args, **_facts: MOST_KEYS[args.side]):
        write_result(args.result, measure(segments, tensors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
