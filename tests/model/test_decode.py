"""A row's next position reads the lead and its own positions, whichever rows stand beside it and come and go."""

import pytest
import torch

from ptune_dist.model.attention import KeysValues
from ptune_dist.model.decode import KeysValuesPool, Pools, round_up

NUM_LAYERS, NUM_GROUPS, NUM_HEADS, WIDTH = 2, 2, 4, 8


def draw_keys_values(length: int, draw: torch.Generator) -> KeysValues:
    shape = (NUM_LAYERS, length, NUM_GROUPS, WIDTH)
    return KeysValues(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw))


def attend_alone(q: torch.Tensor, row: KeysValues, layer: int, window: int | None) -> torch.Tensor:
    """[H, D] of the last position of a row, lead included, that reads all of it or its last `window` positions."""
    keys, values = (part[layer, -(window or 10**6) :].repeat_interleave(2, dim=1) for part in row)
    shares = torch.einsum("hd,chd->hc", q * 0.5, keys).softmax(dim=1)
    return torch.einsum("hc,chd->hd", shares, values)


def join(*parts: KeysValues) -> KeysValues:
    return KeysValues(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def step(pool: KeysValuesPool, rows: list[KeysValues], draw: torch.Generator, window: int | None) -> list[KeysValues]:
    """One pass over all rows, compared with each row alone; the rows with their new position."""
    pool.make_room()
    new = [draw_keys_values(1, draw) for _ in rows]
    rows = [join(row, one) for row, one in zip(rows, new, strict=True)]
    mask = pool.mask(window, torch.device("cpu"))
    for layer in range(NUM_LAYERS):
        q = torch.randn(len(rows), NUM_HEADS, WIDTH, generator=draw)
        k, v = (torch.cat([one[kind][layer] for one in new]) for kind in (0, 1))
        found = pool.attend(q, k, v, layer, 0.5, mask)
        wanted = torch.stack([attend_alone(q[i], row, layer, window) for i, row in enumerate(rows)])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    pool.advance()
    assert pool.lengths == [row.length for row in rows]
    return rows


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("num_lead", [0, 5])
def test_rows_of_a_pool_read_what_they_would_alone(num_lead: int, window: int | None):
    draw = torch.Generator().manual_seed(0)
    lead = draw_keys_values(num_lead, draw)
    pool = KeysValuesPool(lead if num_lead else None)
    rows: list[KeysValues] = []
    for lengths, leaving in (((3, 7), 0), ((20, 2), 1), ((4,), 2), ((1, 9, 5), 0)):  # one is longer than those there
        fresh = [draw_keys_values(length, draw) for length in lengths]
        pool.add(fresh, num_columns=4)
        rows += [join(lead, row) for row in fresh]
        for _ in range(20):  # more than there is spare room for
            rows = step(pool, rows, draw, window)
        pool.remove(leaving)
        rows[leaving] = rows[-1]
        rows.pop()
    while rows:
        pool.remove(0)
        rows[0] = rows[-1]
        rows.pop()
    last = draw_keys_values(2, draw)
    pool.add([last], num_columns=4)
    step(pool, [join(lead, last)], draw, window)


def test_pools_say_which_row_is_where():
    draw = torch.Generator().manual_seed(0)
    pools = Pools(None)
    new = {number: draw_keys_values(length, draw) for number, length in enumerate((3, 100, 5, 60))}
    order = pools.settle([], new, {0: 10, 1: 110, 2: 12, 3: 70})
    assert order == [0, 2, 3, 1] and pools.lengths == [3, 5, 60, 100]
    order = pools.settle([0, 3], {4: draw_keys_values(4, draw)}, {4: 9})  # by their places: rows 0 and 1 leave
    assert order == [1, 4, 2] and pools.lengths == [5, 4, 60]
    assert len(pools.in_order) == 2 and round_up(49) > 49 > 48 == round_up(1)
