"""Attention as two plain matrix products, for short rows on a CPU, where torch's fused kernel is the slower one.

The fused kernel computes its backward pass without the CPU's bfloat16 instructions, and wants grouped keys and values
repeated for every head. docs/benchmarks/attention_cpu.json has both side by side, by `bench.attention`.

Shapes: E entries, Q queries, J keys, H heads, G key/value heads, D width of a head.
"""

import torch

# The most keys of an entry with which products are faster, forward and backward. Where bfloat16 has tiles of its own
# (AMX), the fused kernel uses them too and wins earlier. The scores are kept for backward: E * H * Q * J numbers.
MOST_KEYS_FLOAT32 = 128
MOST_KEYS_BFLOAT16 = 512
MOST_KEYS_BFLOAT16_TILES = 128


def most_keys_by_products(dtype: torch.dtype, *, is_grouped: bool) -> int:
    """Up to how many keys of an entry this CPU is faster with products; 0 where it never is."""
    if dtype == torch.float32:
        return MOST_KEYS_FLOAT32 if is_grouped else 0
    if dtype != torch.bfloat16:
        return 0
    # torch.cpu.get_capabilities, which is public, came after 2.10.
    if torch.cpu._is_amx_tile_supported():
        return MOST_KEYS_BFLOAT16_TILES
    # Without such instructions a product in bfloat16 takes several times as long as one in float32.
    return MOST_KEYS_BFLOAT16 if torch.cpu._is_avx512_bf16_supported() else 0


def attend_by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [E, H, Q, D], k and v [E, G, J, D], `mask` [Q, J] that is added to the scores -> [E, H, Q, D]."""
    num_queries = q.shape[2]
    # All heads of a group are queries of one product: nothing is repeated.
    queries = (q * scale).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (queries @ k.transpose(2, 3)).unflatten(2, (-1, num_queries)) + mask
    shares = scores.softmax(dim=-1).flatten(2, 3)
    return (shares @ v).unflatten(2, (-1, num_queries)).flatten(1, 2)
