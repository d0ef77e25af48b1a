"""Which frozen weights ZeRO-3 leaves gathered: as many as the JSON allows to be live, beside the layers at work."""

import copy

import pytest

from ptune_dist.base.layers import layers_of
from ptune_dist.zero.residency import count_elements, count_resident, settle_residency
from tests.base.bases import open_only

ONE, ALL = "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"


@pytest.fixture(scope="module")
def model(llama):
    return open_only(llama).model


def settle(model, **zero) -> dict:
    content = {"zero_optimization": {"stage": 3} | zero}
    settle_residency(content, model)
    return content["zero_optimization"]


def resident(model, zero: dict) -> list[int]:
    """The sizes of the parameters that DeepSpeed keeps for these thresholds, by its own rule."""
    kept = []
    for size in [parameter.numel() for parameter in model.parameters()]:
        if sum(kept) + size <= zero[ALL] and size <= zero[ONE]:
            kept.append(size)
    return kept


def test_a_base_that_may_be_live_whole_stays_whole(model):
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert resident(model, settle(model)) == sizes  # DeepSpeed's default allows a billion elements
    assert resident(model, settle(model, stage3_max_live_parameters=sum(sizes))) == sizes


def test_of_a_larger_base_so_much_stays_that_two_layers_still_fit(model):
    largest = max(count_elements(layer) for layer in layers_of(model))
    most = count_elements(model) - 1
    kept = resident(model, settle(model, stage3_max_live_parameters=most))
    assert 0 < sum(kept) and sum(kept) + 2 * largest <= most
    assert count_resident(model, most) == most - 2 * largest


def test_a_tensor_that_does_not_fit_is_passed_over_for_a_smaller_one_behind_it(model):
    sizes = [parameter.numel() for parameter in model.parameters()]
    largest = max(count_elements(layer) for layer in layers_of(model))
    room = min(sizes) + 1
    kept = resident(model, settle(model, stage3_max_live_parameters=2 * largest + room))
    assert sizes[0] > room and kept == [min(sizes)]


def test_nothing_stays_where_nothing_may_be_live(model):
    assert resident(model, settle(model, stage3_max_live_parameters=0)) == []


@pytest.mark.parametrize("given", [{ONE: 64}, {ALL: 1000}, {ONE: 0, ALL: 7}])
def test_a_threshold_that_is_given_stays_and_the_other_is_deepspeeds(model, given):
    assert settle(model, **given) == {"stage": 3} | given
    autos = {ONE: "auto", ALL: "auto"} | given
    filled = settle(model, **autos)
    assert {key: filled[key] for key in given} == given and "auto" not in filled.values()


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_an_offloaded_base_keeps_only_what_is_small(model, device):
    offload = {"offload_param": {"device": device}}
    assert settle(model, **offload) == {"stage": 3} | offload
    filled = settle(model, **offload, **{ONE: "auto"})
    assert filled[ONE] == 10 * model.config.hidden_size and ALL not in filled


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_without_shards_there_is_nothing_to_fill(model, stage):
    zero = {"stage": stage, ONE: "auto"}
    given = copy.deepcopy(zero)
    assert settle(model, **zero) == {"stage": stage} and zero == given
