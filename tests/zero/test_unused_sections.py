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
