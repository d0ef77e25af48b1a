"""The DeepSpeed JSON files that people copy, rebuilt from their published keys: all load or say why not.

Each is tried as its project uses it: in the precision that it names and with a schedule of its kind.
"""

import json

import pytest

from ptune_dist.config.deepspeed_json import zero_stage
from ptune_dist.zero.engine import check_with_deepspeed
from ptune_dist.zero.offload import without_autos
from tests.config.test_deepspeed_json import error_of, fill
from tests.processes import ROOT

POSTED = {path.stem: path for path in sorted((ROOT / "tests/config/posted").glob("*.json"))}
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}
# What the files that do not load are told.
REFUSED = {
    "accelerate_zero3_offload": "gradient_accumulation_steps follows from train.batch_size",
    "axolotl_zero1_torch_compile": "compile is not for prompts: model.compile compiles the base",
    "deepspeed_docs_lion": "optimizer.type is 'Lion', which is no value of train.optimizer",
    "deepspeed_docs_onecycle": "scheduler.type is 'OneCycle', which is no value of train.schedule",
    "deepspeed_getting_started": "train_batch_size is 8 but train.batch_size is 32",
    "lightning_zero2": "optimizer.type is 'OneBitAdam', which is no value of train.optimizer",
    "openchat_zero2": "gradient_accumulation_steps follows from train.batch_size",
}


def settings_of(content: dict) -> dict:
    """The config's own settings that a file is posted for."""
    dtype = "bfloat16" if content.get("bf16", {}).get("enabled") is True else "float32"
    dtype = "float16" if content.get("fp16", {}).get("enabled") is True else dtype
    kind = content.get("scheduler", {}).get("type")
    return {"dtype": dtype, "schedule": SCHEDULES.get(kind, "linear")}


@pytest.mark.parametrize("name", POSTED)
def test_a_posted_file_loads_or_is_told_in_one_line_why_not(name):
    path = POSTED[name]
    content = json.loads(path.read_text())
    if name in REFUSED:
        assert REFUSED[name] in error_of(str(path), **settings_of(content))
        return
    filled = fill(str(path), **settings_of(content))
    check_with_deepspeed(without_autos(filled), str(path))
    assert zero_stage(filled) == content.get("zero_optimization", {}).get("stage", 0)
