"""Sums over blocks of a step: a node's ranks bring theirs together, nodes send them, and all add up the same tree."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from ptune_dist.data.blocks import add_up
from ptune_dist.distributed.world import World
from ptune_dist.nodes.blocks import Range


def gather_blocks(
    own: Mapping[Range, torch.Tensor], of_ranks: Sequence[Sequence[Range]], length: int, world: World
) -> dict[Range, torch.Tensor]:
    """The sums [length] of every rank's subtrees, on rank 0; what the others return is of no use. Collective.

    One reduction, to which each rank gives its own sums and zeros for the others': nothing is rounded.
    """
    if world.size == 1:
        return dict(own)
    places = [(rank, one) for rank, some in enumerate(of_ranks) for one in some]
    rows = torch.zeros(len(places), length, device=world.device)
    for place, (rank, one) in enumerate(places):
        if rank == world.rank:
            rows[place] = own[one]
    if places:
        dist.reduce(rows, 0)
    return {one: rows[place] for place, (_, one) in enumerate(places)}


def to_pieces(ranges: Sequence[Range], parts: Mapping[Range, torch.Tensor]) -> dict[Range, bytes]:
    """A node's subtrees as bytes, for the other nodes: float32, in the order of the machine."""
    return {one: add_up(one, parts).cpu().numpy().tobytes() for one in ranges}


def add_pieces(num_blocks: int, pieces: Mapping[Range, bytes]) -> torch.Tensor:
    """The sum over all blocks, in one order whoever has made the pieces."""
    parts = {one: np.frombuffer(piece, "<f4") for one, piece in pieces.items()}
    return torch.from_numpy(np.array(add_up(Range(0, num_blocks), parts)))  # a copy: bytes cannot be written to
