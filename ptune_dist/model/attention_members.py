"""Keys and values of members that stand between a row's context and what follows: each member's once for all its rows.

Shapes: E contexts, M segments per context, B = E * M, S positions of a segment, P positions of the longest member's, G
key/value heads, R queries for each of them, D width of a head.
"""

import torch
from torch.nn.functional import pad

from ptune_dist.model.attention import KeysValues, Segment, additive, reads


class MemberParts:
    """What the segments at E * M places read of their members' own keys and values; nothing where `width` is 0.

    lengths [E, M]: how many positions that is.
    """

    def __init__(
        self, readers: list[Segment], outside: list[KeysValues], shape: tuple[int, int, int], device: torch.device
    ):
        self._outside = outside
        self._shape = shape
        places: dict[tuple[int, ...], list[int]] = {}
        for place, segment in enumerate(readers):
            places.setdefault(segment.of_member, []).append(place)
        self._named = list(places)  # the numbers of the parts of each member
        counts = [sum(outside[number].length for number in named) for named in self._named]
        self.width = max(counts)
        self._counts = counts
        self._places = [torch.tensor(some).to(device) for some in places.values()]
        self._back = torch.tensor([place for some in places.values() for place in some]).argsort().to(device)
        by_member = dict(zip(self._named, counts, strict=True))
        by_place = torch.tensor([by_member[segment.of_member] for segment in readers])
        self.lengths = by_place.unflatten(0, shape[:2]).to(device)
        self._masks: dict[tuple[int, int | None, torch.dtype], torch.Tensor] = {}

    def scores(self, q: torch.Tensor, layer: int, window: int | None) -> list[torch.Tensor]:
        """Masked scores [E, G, M, R, S, P] of scaled queries q [E, G, M, R, S, D], or nothing."""
        if not self.width:
            return []
        rows = q.transpose(0, 1).flatten(1, 2)  # [G, B, R, S, D]
        found = []
        for number, places in enumerate(self._places):
            own = self._pick(rows, places)
            keys = self._join(number, layer, 0)  # [G, P of the member, D]
            scores = (own.flatten(1, 3) @ keys.transpose(1, 2)).unflatten(1, own.shape[1:4])
            scores = scores + self._mask(number, window, q.dtype)
            found.append(pad(scores, (0, self.width - self._counts[number]), value=-torch.inf))
        return [self._put(found)]

    def sums(self, shares: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """Values [E, G, M, R, S, D] weighted by shares [E, G, M, R, S, P], or nothing."""
        if not self.width:
            return []
        rows = shares.transpose(0, 1).flatten(1, 2)  # [G, B, R, S, P]
        found = []
        for number, places in enumerate(self._places):
            own = self._pick(rows, places)[..., : self._counts[number]]
            values = self._join(number, layer, 1)
            found.append((own.flatten(1, 3) @ values).unflatten(1, own.shape[1:4]))
        return [self._put(found)]

    def _pick(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return rows if len(self._places) == 1 else rows.index_select(1, places)

    def _put(self, found: list[torch.Tensor]) -> torch.Tensor:
        """Rows [G, B, ...] of all members at their places: [E, G, M, ...]."""
        whole = found[0] if len(found) == 1 else torch.cat(found, dim=1).index_select(1, self._back)
        return whole.unflatten(1, self._shape[:2]).transpose(0, 1)

    def _join(self, number: int, layer: int, which: int) -> torch.Tensor:
        """A layer's keys (0) or values (1) [G, P of the member, D]."""
        parts = [self._outside[part][which][layer] for part in self._named[number]]
        like = self._outside[0][which][layer]
        return torch.cat([like[:0], *parts]).transpose(0, 1)

    def _mask(self, number: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of a member's segments [S, P of the member]."""
        if (number, window, dtype) not in self._masks:
            keys = torch.arange(self._counts[number], device=self._back.device)
            queries = self._counts[number] + torch.arange(self._shape[2], device=self._back.device)
            self._masks[number, window, dtype] = additive(reads(queries[:, None], keys, window), dtype)
        return self._masks[number, window, dtype]
