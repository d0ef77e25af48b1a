"""Sections that are off, and names that are ours: each is taken, or told in terms of DeepSpeed."""

import pytest

from ptune_dist.errors import UserError
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


def test_a_section_that_names_another_value_is_told_both_ways_out():
    assert error_of({"scheduler": {"type": "WarmupLR"}}).endswith(
        "which DeepSpeed calls WarmupDecayLR: set train.schedule=constant, or the type to 'WarmupDecayLR', or remove "
        "the section"
    )
    assert "set train.schedule=cosine, or the type to 'WarmupDecayLR'" in error_of({"scheduler": {"type": "cosine"}})
    assert error_of({"optimizer": {"type": "SGD"}}).endswith(": set train.optimizer=sgd, or remove the section")


def test_the_precision_of_a_sum_that_deepspeed_does_not_make_is_noted():
    assert "data_types.grad_accum_dtype" in (describe_unused(fill({"data_types": {"grad_accum_dtype": "bf16"}})) or "")
    assert describe_unused(fill({"data_types": {"grad_accum_dtype": "fp32"}})) is None


def test_the_section_that_deepspeed_refuses_is_named_among_several():
    content = without_autos(fill({"zero_optimization": {"stage": 3}}))
    for key, value in {"activation_checkpointing": {"profile": True}, "aio": 7, "flops_profiler": 3}.items():
        content[key] = value
    with pytest.raises(UserError, match="^d.json: DeepSpeed refuses aio: "):
        check_with_deepspeed(content, "d.json")


def test_a_fault_of_ours_is_no_mistake_of_the_users(monkeypatch):
    content = without_autos(fill({"zero_optimization": {"stage": 3}, "aio": {}}))
    with pytest.raises(Exception) as caught:
        check_with_deepspeed(content | {"train_micro_batch_size_per_gpu": "a fault"}, "d.json")
    assert not isinstance(caught.value, UserError)

    def broken(content):
        raise TypeError("a new argument")

    monkeypatch.setattr("ptune_dist.zero.engine.DeepSpeedConfig", broken)
    with pytest.raises(TypeError, match="a new argument"):
        check_with_deepspeed(content, "d.json")
