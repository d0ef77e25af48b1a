"""Flex attention over segments: its plan, its numbers forward and backward, and that members stay apart.

Shapes: N live positions, J keys, R and C blocks of them, H heads, G key/value heads, D width.
"""

import math
import random
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask

from ptune_dist.model import flex_copies
from ptune_dist.model.attention import KeysValues, Segment
from ptune_dist.model.attention_flex import FlexSegments, FlexTables, build_reads
from ptune_dist.model.attention_layouts import build_attention
from ptune_dist.model.flex_plan import BLOCK, FlexPlan, plan_attention, unpack
from ptune_dist.model.layout import Before, Outside, lay_out
from tests.conftest import extended_beyond
from tests.numerics.passes import NUM_VIRTUAL, draw_batch
from tests.numerics.test_attention import CASES, CPU, LAYER, SCALE, draw_case, draw_live, draw_outside

SMALL = 8  # positions of a block


def draw_segments(draw: random.Random) -> tuple[list[Segment], list[int]]:
    """Segments of up to three members in any order, and the lengths from outside."""
    lengths = [draw.choice([0, 5, SMALL, draw.randint(1, 3 * SMALL)]) for _ in range(draw.choice([0, 1, 3]))]
    segments: list[Segment] = []
    num_members = draw.choice([1, 1, 2, 3])
    start = 0
    for _ in range(draw.randint(1, 8)):
        length = draw.choice([1, 3, SMALL, draw.randint(1, 3 * SMALL)])
        member = draw.randrange(num_members)
        named = sorted(draw.sample(range(len(lengths)), draw.randint(0, len(lengths))))
        own = [(s.start, s.length) for s in segments if s.member == member]
        parents = sorted(draw.sample(own, draw.randint(0, min(2, len(own)))))
        offset = sum(lengths[number] for number in named) + sum(count for _, count in parents)
        segments.append(Segment(start, length, tuple(named), tuple(parents), offset, member))
        start += length
    draw.shuffle(segments)
    return segments, lengths


def look_up_reads(segments: list[Segment], lengths: list[int], window: int | None) -> np.ndarray:
    """[N, X + N]: which keys each live position reads."""
    starts = np.cumsum([0, *lengths])
    num_live = sum(s.length for s in segments)
    found = np.zeros((num_live, starts[-1] + num_live), bool)
    for s in segments:
        runs = [(starts[number], lengths[number]) for number in s.contexts]
        runs += [(starts[-1] + start, length) for start, length in (*s.parents, (s.start, s.length))]
        keys = np.concatenate([np.arange(start, start + length) for start, length in runs])
        for own in range(s.length):
            end = s.offset + own + 1
            found[s.start + own, keys[max(0, end - window) if window else 0 : end]] = True
    return found


def places_of(plan: FlexPlan, num_live: int, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    if plan.is_rearranged:
        return plan.put_queries, plan.put_keys
    return np.arange(num_live), np.arange(num_keys)


def dense(num: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.array([np.isin(np.arange(len(row)), row[:count]) for count, row in zip(num, indices, strict=True)])


@pytest.mark.parametrize("seed", range(60))
def test_a_plan_has_the_blocks_of_torchs_own_mask_and_keeps_members_apart(seed):
    draw = random.Random(seed)
    segments, lengths = draw_segments(draw)
    window = draw.choice([None, 3, 20])
    plan = plan_attention(segments, lengths, window, SMALL)
    reads = look_up_reads(segments, lengths, window)
    queries, keys = places_of(plan, *reads.shape)
    num_keys = len(plan.take_keys) or reads.shape[1]
    at_places = np.zeros((plan.lows.shape[1], num_keys), bool)
    at_places[np.ix_(queries, keys)] = reads
    mask = build_reads(torch.from_numpy(plan.lows), torch.from_numpy(plan.highs))
    wanted = create_block_mask(mask, None, None, *at_places.shape, device="cpu", BLOCK_SIZE=SMALL)
    grid = [torch.arange(n) for n in at_places.shape]
    assert np.array_equal(mask(grid[0], grid[0], grid[0][:, None], grid[1]).numpy(), at_places)
    num_blocks = [-(-n // SMALL) for n in at_places.shape]
    for name in ("kv", "full_kv", "q", "full_q"):
        ours = dense(getattr(plan, f"{name}_num"), getattr(plan, f"{name}_indices"))
        num, indices = (getattr(wanted, f"{name}_{part}")[0, 0].numpy() for part in ("num_blocks", "indices"))
        rows, columns = num_blocks if "kv" in name else num_blocks[::-1]
        assert np.array_equal(ours[:rows, :columns], dense(num, indices)), name
        assert not ours[rows:].any() and not ours[:, columns:].any()
    member = np.zeros(len(queries), int)
    for s in segments:
        member[s.start : s.start + s.length] = s.member
    for block in range(num_blocks[0]):
        assert len(set(member[queries // SMALL == block])) <= 1


def test_a_plan_is_packed_into_one_array_and_back():
    plan = plan_attention([Segment(0, 30), Segment(30, 50, (0,), ((0, 30),), 35, 1)], [5], 9)
    flat, shapes = plan.pack()
    assert flat.dtype == np.int32
    for field in fields(FlexPlan):
        wanted = getattr(plan, field.name)
        assert np.array_equal(unpack(flat, shapes)[field.name], wanted), field.name
        assert torch.equal(getattr(FlexTables.of(plan, CPU), field.name), torch.from_numpy(wanted))


def test_a_plan_of_many_positions_takes_little_memory():
    segments = [Segment(0, 20), *(Segment(start, 327, (), ((0, 20),), 20) for start in range(20, 65420, 327))]
    tracemalloc.start()
    plan = plan_attention(segments, [])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.lows.shape[1] == 65420
    assert peak < 100e6  # broadcast over all pairs of positions it would be 4e9


def with_members(segments: list[Segment]) -> list[Segment]:
    """The same, of two members that take turns, as far as no segment reads another member's."""
    members: dict[int, int] = {}
    for number, s in enumerate(segments):
        members[s.start] = members[s.parents[0][0]] if s.parents else number % 2
    return [s._replace(member=members[s.start]) for s in segments]


def run(attention, leaves: list[torch.Tensor], window: int | None) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v and of what is from outside."""
    for leaf in leaves:
        leaf.grad = None
    out = attention.attend(*leaves[:3], layer=LAYER, scale=SCALE, window=window)
    (out * torch.linspace(0.5, 2, out.numel()).reshape(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture
def backward_on_cpu(monkeypatch):
    """Flex attention refuses a backward pass on a CPU, but its plain version has one."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("num_members", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_flex_and_padded_attention_agree_forward_and_backward(case, num_members, window):
    torch.manual_seed(0)
    segments, outside = draw_case(case, 2)
    if num_members == 2:
        segments = with_members(segments)
        assert len({s.member for s in segments}) == 2
    leaves = [t.requires_grad_() for t in (*draw_live(segments, 4, 2), *(t for part in outside for t in part))]
    found = run(FlexSegments(segments, outside, CPU), leaves, window)
    wanted = run(build_attention(segments, outside, CPU), leaves, window)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("from_outside", extended_beyond([(9, 140)], [(), (9,), (9, 140)]))
def test_copies_of_keys_that_many_read_change_nothing(from_outside, window, monkeypatch):
    torch.manual_seed(0)
    named = tuple(range(len(from_outside)))
    segments = [Segment(0, 9, named, (), sum(from_outside))]
    for size in (40, 120, 300, 5, 60):
        start = segments[-1].start + segments[-1].length
        segments.append(Segment(start, size, named, ((0, 9),), sum(from_outside) + 9))
    outside = draw_outside(list(from_outside), 2)
    leaves = [t.requires_grad_() for t in (*draw_live(segments, 4, 2), *(t for part in outside for t in part))]
    wanted = run(build_attention(segments, outside, CPU), leaves, window)
    for readers, num_copies in ((0, 0), (100, 3)):
        monkeypatch.setattr(flex_copies, "READERS_OF_COPY", readers)
        assert len(plan_attention(segments, from_outside, window).take_copies) == num_copies
        found = run(FlexSegments(segments, outside, CPU), leaves, window)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_block_of_keys_is_read_by_very_many_blocks_of_queries():
    segments = [Segment(0, 100), *(Segment(100 + 224 * row, 224, (), ((0, 100),), 100) for row in range(36))]
    plan = plan_attention(segments, [])
    assert (plan.q_num + plan.full_q_num).max() <= 8
    assert plan.lows.shape[1] == 100 + 36 * 224  # queries stay where they are
    apart = plan_attention([s._replace(member=s.start % 3) for s in segments], [])
    assert not len(apart.take_copies)


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("window", [None, 6])
def test_members_with_keys_of_their_own_before_a_context_agree_too(window):
    torch.manual_seed(0)
    lengths = [7, 3, 20, 11]  # two members' prefixes of different length, two contexts
    reads = [(0, 2), (1, 2), (0, 3), (1, 3)]
    sizes = [5, 30, 1, 9]
    segments = []
    for number, (named, size) in enumerate(zip(reads, sizes, strict=True)):
        offset = sum(lengths[part] for part in named)
        segments.append(Segment(sum(sizes[:number]), size, named, (), offset, number % 2))
    outside = [KeysValues(*torch.randn(2, 2, length, 2, 16)) for length in lengths]
    live = [torch.randn(sum(sizes), heads, 16) for heads in (4, 2, 2)]
    leaves = [t.requires_grad_() for t in (*live, *(t for part in outside for t in part))]
    found = run(FlexSegments(segments, outside, CPU), leaves, window)
    wanted = run(build_attention(segments, outside, CPU), leaves, window)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def kernel_gradients(plan: FlexPlan, q, k, v, gradient, block: int) -> list[torch.Tensor]:
    """dq, dk, dv of one head [N, D], as a kernel computes them: whole blocks at a time, masked by zeros."""
    queries, keys = (torch.from_numpy(t.astype(np.int64)) for t in places_of(plan, len(q), len(k)))
    take = [torch.from_numpy(t.astype(np.int64)) for t in (plan.take_queries, plan.take_keys)]
    q, gradient = (t[take[0]] if plan.is_rearranged else t for t in (q, gradient))
    k, v = (t[take[1]] if plan.is_rearranged else t for t in (k, v))
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    mask = build_reads(torch.from_numpy(plan.lows), torch.from_numpy(plan.highs))
    visited = dense(plan.kv_num, plan.kv_indices) | dense(plan.full_kv_num, plan.full_kv_indices)
    for r in range(-(-len(q) // block)):
        rows = torch.arange(r * block, min(len(q), (r + 1) * block))
        columns = torch.cat([torch.arange(c * block, min(len(k), (c + 1) * block)) for c in np.flatnonzero(visited[r])])
        reads = mask(rows, rows, rows[:, None], columns)
        scores = (q[rows] @ k[columns].T).masked_fill(~reads, -math.inf)
        shares = scores.softmax(1).where(reads.any(1, keepdim=True), 0.0)
        of_shares = gradient[rows] @ v[columns].T
        of_scores = shares * (of_shares - (shares * of_shares).sum(1, keepdim=True))
        dq[rows] += of_scores @ k[columns]
        dk[columns] += of_scores.T @ q[rows]
        dv[columns] += shares.T @ gradient[rows]
    return [dq[queries], dk[keys], dv[keys]]


@pytest.mark.parametrize("spoilt", ["q", "gradient"])
def test_what_is_not_a_number_in_one_member_reaches_no_gradient_of_another(spoilt):
    torch.manual_seed(0)
    reads = [(), (), ((0, 5),), ((5, 5),), ((0, 5),)]
    members = [0, 1, 0, 1, 0]
    sizes = [5, 5, 6, 7, 8]
    starts = np.cumsum([0, *sizes]).tolist()
    segments = [
        Segment(start, size, (), parents, sum(n for _, n in parents), member)
        for start, size, parents, member in zip(starts, sizes, reads, members, strict=False)
    ]
    of_other = torch.cat([torch.arange(s.start, s.start + s.length) for s in segments if s.member == 1])
    names = ("q", "k", "v", "gradient")
    sound = {name: torch.randn(starts[-1], 4) for name in names}
    broken = sound | {spoilt: sound[spoilt].clone()}
    broken[spoilt][segments[2].start] = math.nan
    plan = plan_attention(segments, [], None, SMALL)
    wanted = kernel_gradients(plan, *sound.values(), SMALL)
    found = kernel_gradients(plan, *broken.values(), SMALL)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours[of_other], theirs[of_other])
        assert not ours.isfinite().all()  # the member itself is not cleaned: its overflow is seen
    # The same passes where both are one member: their positions share blocks, and it spreads.
    together = plan_attention([s._replace(member=0) for s in segments], [], None, SMALL)
    assert not kernel_gradients(together, *broken.values(), SMALL)[2][of_other].isfinite().all()


@pytest.mark.usefixtures("backward_on_cpu")
def test_gradients_by_blocks_are_those_of_autograd():
    torch.manual_seed(0)
    segments = [Segment(0, 5), Segment(5, 9, (), ((0, 5),), 5), Segment(14, 7, (), ((0, 5),), 5, 1)]
    q, k, v = (torch.randn(21, 4, requires_grad=True) for _ in range(3))
    gradient = torch.randn(21, 4)
    attention = FlexSegments(segments, [], CPU)
    attention.attend(*(t[:, None] for t in (q, k, v)), layer=0, scale=1.0, window=None)[:, 0].backward(gradient)
    plan = plan_attention(segments, [], None, SMALL)
    found = kernel_gradients(plan, *(t.detach() for t in (q, k, v)), gradient, SMALL)
    for ours, theirs in zip(found, (q.grad, k.grad, v.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["prefix", "template"])
def test_segments_are_their_members(case):
    batch, _ = draw_batch(case)
    rows = [Before() for _ in batch.contexts]
    segments = lay_out(batch, list(NUM_VIRTUAL), Outside([], rows, [Before(), Before()])).segments
    shared = [0, 1] if case == "prefix" else []
    assert [s.member for s in segments] == shared + [member for _, member in batch.readers]


def test_blocks_are_of_the_size_that_the_kernels_take():
    assert BLOCK == 128
