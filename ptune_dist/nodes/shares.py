"""Which node computes which blocks, by measured speed. Pure functions, called by every node with equal arguments."""

from collections.abc import Mapping, Sequence

from ptune_dist.nodes.blocks import Range, subtrees

Owners = tuple[tuple[Range, str], ...]  # of all blocks, in order; the node by its id
UNKNOWN_IS_SLOWER = 1.5  # a node that has not been measured counts as this much slower than the slowest
KEEP_WITHIN = 1.15  # shares stay as they are unless new ones make the step this much shorter: speeds are noisy
COARSE_WITHIN = 1.05  # coarser cuts save bytes: they are taken unless they cost more than this


def divide(blocks: Range, nodes: Sequence[str], seconds: Mapping[str, float]) -> Owners:
    """Contiguous shares of `blocks` (any run of blocks), so that all nodes take about the same time.

    seconds: per block, of the nodes that have been measured. Every node gets a block where there are enough.
    """
    known = [seconds[node] for node in nodes if node in seconds]
    default = max(known) * UNKNOWN_IS_SLOWER if known else 1.0
    costs = [seconds.get(node, default) for node in nodes]
    counts = count_blocks(blocks.num_blocks, costs)
    best = longest(counts, costs)
    unit = 1
    while unit * 2 * len(nodes) <= blocks.num_blocks and blocks.num_blocks % (unit * 2) == 0:
        coarser = [count * unit * 2 for count in count_blocks(blocks.num_blocks // (unit * 2), costs)]
        unit *= 2
        if longest(coarser, costs) <= best * COARSE_WITHIN:
            counts = coarser
    owners = []
    start = blocks.lo
    for node, count in zip(nodes, counts, strict=True):
        owners += [(piece, node) for piece in subtrees(start, start + count)]
        start += count
    return tuple(owners)


def count_blocks(num_blocks: int, costs: Sequence[float]) -> list[int]:
    """How many blocks each node gets, by its seconds per block: one after another to who is done first."""
    counts = [0] * len(costs)
    if num_blocks >= len(costs):
        counts = [1] * len(costs)
    for _ in range(num_blocks - sum(counts)):
        first = min(range(len(costs)), key=lambda i: ((counts[i] + 1) * costs[i], i))
        counts[first] += 1
    return counts


def longest(counts: Sequence[int], costs: Sequence[float]) -> float:
    return max(count * cost for count, cost in zip(counts, costs, strict=True))


def step_seconds(owners: Owners, seconds: Mapping[str, float]) -> float:
    """How long the slowest node takes for its blocks, of the nodes that have been measured."""
    return max((count * seconds[node] for node, count in num_blocks_of(owners).items() if node in seconds), default=0.0)


def num_blocks_of(owners: Owners) -> dict[str, int]:
    counts: dict[str, int] = {}
    for piece, node in owners:
        counts[node] = counts.get(node, 0) + piece.num_blocks
    return counts


def next_shares(num_blocks: int, nodes: Sequence[str], seconds: Mapping[str, float], before: Owners) -> Owners:
    """The shares of the next step; those of the step before where they are nearly as good."""
    new = divide(Range(0, num_blocks), nodes, seconds)
    has_same_nodes = set(num_blocks_of(before)) == set(num_blocks_of(new)) and all(node in seconds for node in nodes)
    if has_same_nodes and step_seconds(before, seconds) <= KEEP_WITHIN * step_seconds(new, seconds):
        return before
    return new


def take_over(lost: Sequence[Range], nodes: Sequence[str], seconds: Mapping[str, float]) -> Owners:
    """Who computes the ranges of nodes that were lost."""
    blocks = [block for piece in sorted(lost) for block in range(piece.lo, piece.hi)]
    owners = []
    for share, node in divide(Range(0, len(blocks)), nodes, seconds) if blocks else ():
        taken = blocks[share.lo : share.hi]
        starts = [i for i in range(len(taken)) if i == 0 or taken[i] != taken[i - 1] + 1]
        for start, end in zip(starts, [*starts[1:], len(taken)], strict=True):
            owners += [(piece, node) for piece in subtrees(taken[start], taken[end - 1] + 1)]
    return tuple(owners)
