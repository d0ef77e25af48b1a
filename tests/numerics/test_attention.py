"""Every kind of attention over segments gives what each query's own keys give it, looked up one query at a time."""

import math

import numpy as np
import pytest
import torch

from ptune_dist.model import attention
from ptune_dist.model.attention import CausalSegments, KeysValues, Segment, attend
from ptune_dist.model.attention_contexts import ContextSegments
from ptune_dist.model.attention_flex import FlexSegments
from ptune_dist.model.attention_layouts import RecordedSegments, build_attention
from ptune_dist.model.attention_products import most_keys_by_products
from ptune_dist.model.layout import Before, Outside, lay_out
from tests.numerics.passes import NUM_VIRTUAL, draw_batch

CPU = torch.device("cpu")
LAYER, SCALE, WIDTH = 1, 0.4, 8
CASES = ["prefix", "shared", "infix", "template"]


def draw_outside(lengths: list[int], num_heads: int) -> list[KeysValues]:
    return [KeysValues(*torch.randn(2, 2, length, num_heads, WIDTH)) for length in lengths]


def draw_case(case: str, num_heads: int) -> tuple[list[Segment], list[KeysValues]]:
    """The segments of a micro-batch, and its contexts: a lead that all share and what follows it in each."""
    batch, lead = draw_batch(case)
    own = [len(context) - len(lead) for context in batch.contexts]
    if case == "prefix":
        outside = []
        numbers = [()] * len(own)
    elif case == "shared":
        outside = draw_outside([len(lead)], num_heads)
        numbers = [(0,)] * len(own)
    else:
        outside = draw_outside([len(lead), *own], num_heads)
        numbers = [(0, number) for number in range(1, len(own) + 1)]
    rows = [Before(some, len(context)) for some, context in zip(numbers, batch.contexts, strict=True)]
    members = [Before()] * len(NUM_VIRTUAL)
    return lay_out(batch, list(NUM_VIRTUAL), Outside(outside, rows, members)).segments, outside


def draw_live(segments: list[Segment], num_queries: int, num_heads: int) -> list[torch.Tensor]:
    num_live = max(s.start + s.length for s in segments)
    return [torch.randn(num_live, heads, WIDTH) for heads in (num_queries, num_heads, num_heads)]


def look_up(segments, outside, q, k, v, window: int | None) -> torch.Tensor:
    """[N, H, D]: for each live position, softmax over exactly the keys that stand before it in its text."""
    out, repeats = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for s in segments:
        parts = [(outside[number].keys[LAYER], outside[number].values[LAYER]) for number in s.contexts]
        parts += [(k[start : start + length], v[start : start + length]) for start, length in s.parents]
        keys = torch.cat([*(part[0] for part in parts), k[s.start : s.start + s.length]])
        values = torch.cat([*(part[1] for part in parts), v[s.start : s.start + s.length]])
        assert len(keys) == s.offset + s.length
        for own in range(s.length):
            end = s.offset + own + 1
            begin = max(0, end - window) if window else 0
            for head in range(q.shape[1]):
                scores = keys[begin:end, head // repeats] @ q[s.start + own, head] * SCALE
                out[s.start + own, head] = scores.softmax(0) @ values[begin:end, head // repeats]
    return out


@pytest.mark.parametrize("window", [None, 6, 30])
@pytest.mark.parametrize("num_queries, num_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("case", CASES)
def test_flex_and_padded_attention_give_each_query_its_own_keys(case, num_queries, num_heads, window):
    torch.manual_seed(0)
    segments, outside = draw_case(case, num_heads)
    q, k, v = draw_live(segments, num_queries, num_heads)
    wanted = look_up(segments, outside, q, k, v, window)
    assert {"prefix": CausalSegments, "shared": CausalSegments}.get(case, ContextSegments) is type(
        build_attention(segments, outside, CPU)
    )
    kinds = [build_attention(segments, outside, CPU), FlexSegments(segments, outside, CPU)]
    for kind in kinds:
        with torch.no_grad():
            found = kind.attend(q, k, v, layer=LAYER, scale=SCALE, window=window)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6, msg=lambda m, k=kind: f"{k}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("num_heads", [4, 2])
def test_products_and_the_fused_kernel_give_the_same_outputs_and_gradients(num_heads, window, dtype, monkeypatch):
    torch.manual_seed(0)
    segments, outside = draw_case("shared", num_heads)
    drawn = draw_live(segments, 4, num_heads)

    def attend(most_keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
        monkeypatch.setattr(attention, "most_keys_by_products", lambda *_args, **_facts: most_keys)
        tensors = [tensor.to(dtype).requires_grad_() for tensor in drawn]
        kind = CausalSegments(segments, [part.to(dtype) for part in outside], CPU)
        out = kind.attend(*tensors, layer=LAYER, scale=SCALE, window=window)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    wanted = attend(0, torch.float32)
    found = attend(10_000, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bfloat16 has 8 bits, and scores are rounded to them
    for exact, tensor in zip(wanted, found, strict=True):
        assert (tensor.float() - exact).norm() <= tolerance * exact.norm()
    if dtype == torch.float32:
        assert not all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))  # another order of sums


@pytest.mark.parametrize(
    ("has_tiles", "has_bfloat16", "limits"),
    [(True, True, (128, 128)), (False, True, (512, 512)), (False, False, (0, 0))],
)
def test_products_are_chosen_by_dtype_and_by_what_the_cpu_can_do(has_tiles, has_bfloat16, limits, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    assert tuple(most_keys_by_products(torch.bfloat16, is_grouped=grouped) for grouped in (False, True)) == limits
    assert most_keys_by_products(torch.float32, is_grouped=True) == 128
    assert most_keys_by_products(torch.float32, is_grouped=False) == 0
    assert most_keys_by_products(torch.float16, is_grouped=True) == 0


@pytest.mark.parametrize(("device", "is_asked"), [("cpu", True), ("meta", False)])
def test_products_are_for_a_cpu_only(device, is_asked, monkeypatch):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(attention, "most_keys_by_products", lambda dtype, **_facts: asked.append(dtype) or 0)
    segments, _ = draw_case("prefix", 2)
    q, k, v = (tensor.to(device) for tensor in draw_live(segments, 4, 2))
    CausalSegments(segments, None, torch.device(device)).attend(q, k, v, layer=LAYER, scale=SCALE, window=None)
    assert asked == [torch.float32] * is_asked


class Layer(torch.nn.Module):
    """A layer's attention, as `attend` sees it. own_window: where it has a window without handing it on."""

    def __init__(self, own_window: int | None):
        super().__init__()
        self.layer_idx = LAYER
        self.sliding_window = own_window


@pytest.mark.parametrize(("own", "given", "wanted"), [(None, 6, 6), (30, 6, 6), (6, None, 6), (None, None, None)])
def test_a_window_that_a_layer_hands_on_goes_before_its_own(own, given, wanted):
    torch.manual_seed(0)
    segments, outside = draw_case("infix", 2)
    q, k, v = draw_live(segments, 4, 2)
    expected = look_up(segments, outside, q * (WIDTH**-0.5 / SCALE), k, v, wanted)  # no scale is given
    kind = build_attention(segments, outside, CPU)
    inputs = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    found, weights = attend(Layer(own), *inputs, None, segments=kind, sliding_window=given)
    assert weights is None
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 33, 7, 60), (12,)])
def test_contexts_with_and_without_a_lead_are_computed_and_recorded_alike(lengths, window):
    torch.manual_seed(0)
    starts = np.cumsum([0, *lengths]).tolist()
    for num_lead in (0, 9):
        named = (0,) if num_lead else ()
        before = (named, (), num_lead) if num_lead else ()  # by default a segment is the first of its text
        segments = [Segment(start, n, *before) for start, n in zip(starts, lengths, strict=False)]
        outside = draw_outside([num_lead], 2) if num_lead else []
        q, k, v = draw_live(segments, 4, 2)
        wanted = look_up(segments, outside, q, k, v, window)
        recorded = RecordedSegments(segments, outside, CPU)
        flex, causal = FlexSegments(segments, outside, CPU), CausalSegments(segments, outside, CPU)
        for kind in (recorded, flex, causal):
            with torch.no_grad():
                found = kind.attend(q, k, v, layer=LAYER, scale=SCALE, window=window)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
        for (keys, values), s in zip(recorded.cut(), segments, strict=True):
            assert torch.equal(keys, k[None, s.start : s.start + s.length])
            assert torch.equal(values, v[None, s.start : s.start + s.length])


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_a_number_in_one_segment_reaches_no_other(case):
    torch.manual_seed(0)
    segments, outside = draw_case(case, 2)
    q, k, v = draw_live(segments, 4, 2)
    broken = segments[0] if case in ("prefix", "shared") else segments[3]
    run = slice(broken.start, broken.start + broken.length)
    spoilt = [tensor.clone() for tensor in (q, k, v)]
    for tensor in spoilt:
        tensor[run] = math.nan
    reads_it = [s for s in segments if s is broken or (broken.start, broken.length) in s.parents]
    others = torch.ones(len(q), dtype=torch.bool)
    for s in reads_it:
        others[s.start : s.start + s.length] = False
    assert others.any() and not others.all()
    for kind in (build_attention, FlexSegments):
        with torch.no_grad():
            before = kind(segments, outside, CPU).attend(q, k, v, layer=LAYER, scale=SCALE, window=None)
            after = kind(segments, outside, CPU).attend(*spoilt, layer=LAYER, scale=SCALE, window=None)
        assert torch.equal(after[others], before[others]), kind
