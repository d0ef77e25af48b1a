"""The same promises on CUDA: NCCL, fp16's loss scale, int8, offload, as many ranks as there are GPUs."""

import json
import math
import os
import random
from pathlib import Path

import pytest
import torch

from ptune_dist.model.attention import KeysValues, Segment
from ptune_dist.model.attention_layouts import build_attention
from ptune_dist.model.flex_plan import plan_attention
from tests.conftest import TINY, build_tiny_base
from tests.numerics.test_curves import curve, train_all, write_spec, zero_json
from tests.numerics.test_flex import draw_segments, look_up_reads

GPUS = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
}
pytestmark = [pytest.mark.gpu, pytest.mark.long]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """With heads as wide as flex attention needs them."""
    return build_tiny_base("llama", tmp_path_factory.mktemp("base"), hidden_size=64)


def mixed(stage: int, dtype: str) -> tuple[dict, list[str]]:
    """DeepSpeed's JSON and overrides for one stage and precision."""
    content = zero_json(stage)
    if dtype == "float16":
        content["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}
    if dtype == "bfloat16":
        content["bf16"] = {"enabled": True}
    return content, [f"model.dtype={dtype}"]


def test_every_stage_gives_one_curve_on_the_gpu(base, tmp_path):
    specs = [write_spec(tmp_path, base, f"stage{stage}", *mixed(stage, "float32")) for stage in range(4)]
    runs = train_all(specs, tmp_path, num_ranks=torch.cuda.device_count(), env=GPUS)
    expected = curve(runs["stage0"])
    for stage in (1, 2, 3):
        assert curve(runs[f"stage{stage}"]) == pytest.approx(expected, rel=1e-5), stage


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_the_quickstart_at_every_stage(tmp_path, dtype):
    specs = []
    for stage in range(4):
        content, overrides = mixed(stage, dtype)
        config, _ = write_spec(tmp_path, TINY / "causal", f"stage{stage}", content, [])
        more = ["prompt.init=vocab", "prompt.init_file=null", "prompt.num_virtual_tokens=10", "train.max_steps=100",
                "train.batch_size=32"]  # fmt: skip
        specs.append((config, overrides + more))
    for name, run in train_all(specs, tmp_path, num_ranks=torch.cuda.device_count(), env=GPUS).items():
        losses = curve(run)
        assert sum(losses[-10:]) / 10 < 0.1 * losses[0], name
        summary = json.loads(Path(run, "summary.json").read_text())
        assert summary["skipped_steps"] < 10, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_int8_base_gives_one_curve_whole_sharded_offloaded_and_checkpointed(base, tmp_path, dtype):
    offload = {"device": "cpu", "pin_memory": True}
    settings = {
        "whole": (0, {}, {}),
        "sharded": (3, {}, {}),
        "offloaded": (3, {"offload_param": offload}, {}),
        "checkpointed": (3, {}, {"activation_checkpointing": {"cpu_checkpointing": True}}),
    }
    specs = []
    for name, (stage, zero, more) in settings.items():
        content, overrides = mixed(stage, dtype)
        content["zero_optimization"] |= zero
        overrides = [*overrides, "model.quantization=int8", "train.max_steps=10"]
        specs.append(write_spec(tmp_path, base, name, content | more, overrides))
    runs = train_all(specs, tmp_path, num_ranks=torch.cuda.device_count(), env=GPUS)
    tolerance = 1e-5 if dtype == "float32" else 3e-3  # half precision has three digits
    for name, run in runs.items():
        assert curve(run) == pytest.approx(curve(runs["whole"]), rel=tolerance), name


def test_llm_int8_follows_the_float_curve_with_and_without_outliers(base, tmp_path):
    content, overrides = mixed(0, "float16")
    more = {"float": [], "plain": ["model.int8_threshold=0"], "outliers": ["model.int8_threshold=3"]}
    specs = []
    for name, extra in more.items():
        int8 = ["model.quantization=int8", "model.int8_activations=true"] if extra else []
        specs.append(write_spec(tmp_path, base, name, content, [*overrides, *int8, *extra]))
    runs = train_all(specs, tmp_path, num_ranks=1, env=GPUS)
    for name in ("plain", "outliers"):
        assert curve(runs[name]) == pytest.approx(curve(runs["float"]), rel=0.02), name


def attend_densely(leaves: list[torch.Tensor], segments: list[Segment], lengths: list[int], window: int | None):
    """[N, H, D] in float64, with the mask of all pairs of positions."""
    q, k, v, *outside = (leaf.detach().double().cpu().requires_grad_() for leaf in leaves)
    keys = torch.cat([*(part[0] for part in outside[::2]), k]).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    values = torch.cat([*(part[0] for part in outside[1::2]), v]).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("nhd,jhd->hnj", q, keys) * 0.3
    scores = scores.masked_fill(~torch.from_numpy(look_up_reads(segments, lengths, window)), -math.inf)
    out = torch.einsum("hnj,jhd->nhd", scores.softmax(-1), values)
    out.sin().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in (q, k, v, *outside))]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("width", [8, 16, 128])
def test_attention_over_segments_is_that_of_all_pairs(seed, dtype, tolerance, width):
    draw = random.Random(seed)
    segments, lengths = draw_segments(draw)
    window = draw.choice([None, 3, 20])
    torch.manual_seed(seed)
    num_live = sum(s.length for s in segments)
    shapes = [(num_live, 4, width), *[(num_live, 2, width)] * 2, *((1, n, 2, width) for n in lengths for _ in range(2))]
    leaves = [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]
    outside = [KeysValues(*leaves[3 + 2 * i : 5 + 2 * i]) for i in range(len(lengths))]
    if width == 8:  # padded calls know the layouts of passes only
        segments = sorted(segments, key=lambda s: s.start)
        lengths, outside, leaves = [], [], leaves[:3]
        segments = [s._replace(contexts=(), offset=sum(n for _, n in s.parents)) for s in segments]
    attention = build_attention(segments, outside, torch.device("cuda"))
    out = attention.attend(*leaves[:3], layer=0, scale=0.3, window=window)
    out.float().sin().sum().backward()
    wanted = attend_densely(leaves, segments, lengths, window)
    for ours, theirs in zip([out.detach(), *(leaf.grad for leaf in leaves)], wanted, strict=True):
        found = torch.zeros_like(theirs) if ours is None else ours.double().cpu()
        torch.testing.assert_close(found, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_copies_of_keys_that_many_read_change_nothing_on_the_gpu(dtype, tolerance):
    torch.manual_seed(0)
    rows = [Segment(start, 224, (0,), ((0, 50),), 80) for start in range(50, 50 + 6 * 224, 224)]
    segments = [Segment(0, 50, (0,), (), 30), *rows]
    assert len(plan_attention(segments, [30]).take_copies) == 3
    num_live = rows[-1].start + 224
    shapes = [(num_live, 4, 16), *[(num_live, 2, 16)] * 2, *[(1, 30, 2, 16)] * 2]
    leaves = [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]
    attention = build_attention(segments, [KeysValues(*leaves[3:])], torch.device("cuda"))
    out = attention.attend(*leaves[:3], layer=0, scale=0.3, window=None)
    out.float().sin().sum().backward()
    wanted = attend_densely(leaves, segments, [30], None)
    for ours, theirs in zip([out.detach(), *(leaf.grad for leaf in leaves)], wanted, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours.double().cpu() / scale, theirs / scale, rtol=tolerance, atol=tolerance)


def test_what_is_not_a_number_in_one_member_reaches_no_gradient_of_another_on_the_gpu():
    torch.manual_seed(0)
    segments = [
        Segment(0, 5),
        Segment(5, 5, member=1),
        Segment(10, 90, (), ((0, 5),), 5),
        Segment(100, 90, (), ((5, 5),), 5, 1),
    ]
    of_other = torch.tensor([*range(5, 10), *range(100, 190)], device="cuda")
    gradients = []
    sound = torch.randn(190, 2, 16, device="cuda")
    broken = sound.clone()
    broken[20] = math.nan
    live = [torch.randn(190, 2, 16, device="cuda") for _ in range(3)]
    for gradient in (sound, broken):
        leaves = [tensor.clone().requires_grad_() for tensor in live]
        attention = build_attention(segments, [], torch.device("cuda"))
        attention.attend(*leaves, layer=0, scale=0.3, window=None).backward(gradient)
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours[of_other], theirs[of_other])
    assert not gradients[1][2].isfinite().all()
