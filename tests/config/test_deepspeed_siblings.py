"""Sections that are off, and names that are ours: each is taken, or told in terms of DeepSpeed."""

import pytest

from ptune_dist.zero.engine import check_with_deepspeed
from ptune_dist.zero.offload import without_autos
from ptune_dist.zero.unused_sections import describe_unused
from tests.config.test_deepspeed_json import error_of, fill


@pytest.mark.parametrize("section", ["elasticity", "nebula"])
def test_a_section_that_deepspeed_has_no_more_is_taken_where_it_is_off(section):
    check_with_deepspeed(without_autos(fill({section: {"enabled": False}})), "d.json")


def test_a_schedule_by_our_name_is_told_deepspeeds():
    assert "train.schedule is 'linear', which DeepSpeed calls WarmupDecayLR" in error_of(
        {"scheduler": {"type": "linear"}}
    )


def test_the_precision_of_a_sum_that_deepspeed_does_not_make_is_noted():
    assert "data_types.grad_accum_dtype" in (describe_unused(fill({"data_types": {"grad_accum_dtype": "bf16"}})) or "")
    assert describe_unused(fill({"data_types": {"grad_accum_dtype": "fp32"}})) is None
