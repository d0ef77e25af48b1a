"""A section of DeepSpeed's JSON that changes nothing is named."""

import pytest

from ptune_dist.zero.unused_sections import describe_unused


@pytest.mark.parametrize("stage", [0, 3])
def test_what_profiles_deepspeeds_own_steps_is_named_where_it_is_on(stage):
    content = {"zero_optimization": {"stage": stage}, "flops_profiler": {"enabled": True}, "wall_clock_breakdown": True}
    assert "no effect: flops_profiler, wall_clock_breakdown: " in describe_unused(content)
    assert describe_unused({"zero_optimization": {"stage": stage}, "flops_profiler": {"enabled": False}}) is None


def test_what_describes_the_base_acts_at_stage_3_alone():
    content = {"comms_logger": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
    assert describe_unused(content | {"zero_optimization": {"stage": 3}}) is None
    found = describe_unused(content | {"zero_optimization": {"stage": 2}})
    assert "comms_logger, data_types.buffer_dtype" in found and "\n" not in found


def test_what_is_about_deepspeeds_checkpoints_is_named():
    on = {"load_universal": True, "use_node_local_storage": True, "tag_validation": "Fail", "writer": {"type": "x"}}
    found = describe_unused({"checkpoint": on, "zero_optimization": {"elastic_checkpoint": True}}) or ""
    assert all(f"checkpoint.{name}" in found for name in on) and "zero_optimization.elastic_checkpoint" in found
    off = {"load_universal": False, "tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}}
    assert describe_unused({"checkpoint": off | {"checkpoint_serialization": True, "writer": None}}) is None
