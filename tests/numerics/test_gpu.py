"""The same promises on CUDA: NCCL, fp16's loss scale, int8, offload, as many ranks as there are GPUs."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from tests.numerics.test_curves import curve, train_all, write_spec, zero_json

GPUS = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
}
pytestmark = [pytest.mark.gpu, pytest.mark.long]


def mixed(stage: int, dtype: str) -> tuple[dict, list[str]]:
    """DeepSpeed's JSON and overrides for one stage and precision."""
    content = zero_json(stage)
    if dtype == "float16":
        content["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}
    if dtype == "bfloat16":
        content["bf16"] = {"enabled": True}
    return content, [f"model.dtype={dtype}"]


def test_every_stage_gives_one_curve_on_the_gpu(tiny_bases, tmp_path):
    base = tiny_bases["llama"]
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
def test_an_int8_base_gives_one_curve_whole_sharded_offloaded_and_checkpointed(tiny_bases, tmp_path, dtype):
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
        specs.append(write_spec(tmp_path, tiny_bases["llama"], name, content | more, overrides))
    runs = train_all(specs, tmp_path, num_ranks=torch.cuda.device_count(), env=GPUS)
    tolerance = 1e-5 if dtype == "float32" else 3e-3  # half precision has three digits
    for name, run in runs.items():
        assert curve(run) == pytest.approx(curve(runs["whole"]), rel=tolerance), name


def test_llm_int8_follows_the_float_curve_with_and_without_outliers(tiny_bases, tmp_path):
    content, overrides = mixed(0, "float16")
    more = {"float": [], "plain": ["model.int8_threshold=0"], "outliers": ["model.int8_threshold=3"]}
    specs = []
    for name, extra in more.items():
        int8 = ["model.quantization=int8", "model.int8_activations=true"] if extra else []
        specs.append(write_spec(tmp_path, tiny_bases["llama"], name, content, [*overrides, *int8, *extra]))
    runs = train_all(specs, tmp_path, num_ranks=1, env=GPUS)
    for name in ("plain", "outliers"):
        assert curve(runs[name]) == pytest.approx(curve(runs["float"]), rel=0.02), name
