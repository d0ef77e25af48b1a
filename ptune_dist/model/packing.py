"""Arrays on their way to a device: packed into one buffer, so that a pass needs one copy, which nobody waits for."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ptune_dist.distributed.world import is_pinned_for

ALIGNMENT = 8  # bytes, so that every array can be read as its own type


class Place(NamedTuple):
    """Where an array stands in a buffer, in bytes, and what it is."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """Arrays by name, one after another in a buffer of bytes on the host, which is pinned for a GPU."""

    buffer: torch.Tensor
    places: dict[str, Place]

    def unpack(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arrays on a device, as views of one copy."""
        moved = self.buffer.to(device, non_blocking=True)
        return {
            name: moved[place.start : place.end].view(place.dtype).view(place.shape)
            for name, place in self.places.items()
        }


def pack(arrays: dict[str, np.ndarray], device: torch.device) -> Packed:
    """Pack arrays for a device. It touches no device, beyond pinning the buffer for a GPU."""
    places = {}
    end = 0
    for name, array in arrays.items():
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + array.nbytes
        places[name] = Place(start, end, torch.from_numpy(array[:0]).dtype, array.shape)
    content = np.empty(end, np.uint8)
    for name, array in arrays.items():
        content[places[name].start : places[name].end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = torch.from_numpy(content)
    return Packed(buffer.pin_memory() if is_pinned_for(device) else buffer, places)
