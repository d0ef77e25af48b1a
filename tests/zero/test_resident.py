"""Which frozen weights ZeRO-3 leaves gathered: as many as the JSON allows to be live, beside what is at work."""

from types import SimpleNamespace

from torch import nn

from ptune_dist.zero.resident import choose_resident


def parameters_of(*sizes: int, trained: int | None = None) -> list:
    return [
        SimpleNamespace(ds_numel=size, requires_grad=number == trained, number=number)
        for number, size in enumerate(sizes)
    ]


def layer_of(*parameters) -> nn.Module:
    layer = nn.Module()
    layer.parameters = lambda: iter(parameters)
    return layer


def test_a_base_that_may_be_live_whole_stays_whole_but_for_what_is_trained():
    parameters = parameters_of(50, 30, 20, trained=2)
    assert [p.number for p in choose_resident(parameters, [layer_of(*parameters[:2])], most=100)] == [0, 1]


def test_of_a_larger_base_so_much_stays_that_two_layers_still_fit():
    parameters = parameters_of(10, 40, 40, 40)
    layers = [layer_of(p) for p in parameters[1:]]
    chosen = choose_resident(parameters, layers, most=100)
    assert [p.number for p in chosen] == [0]
    assert sum(p.ds_numel for p in chosen) + 2 * 40 <= 100


def test_nothing_stays_where_nothing_may_be_live():
    parameters = parameters_of(10, 10)
    assert choose_resident(parameters, [layer_of(*parameters)], most=0) == []


def test_a_tensor_that_does_not_fit_is_passed_over_for_a_smaller_one_behind_it():
    parameters = parameters_of(90, 5, 100)
    assert [p.number for p in choose_resident(parameters, [layer_of(parameters[1])], most=100)] == [0]
    assert [p.number for p in choose_resident(parameters, [layer_of(parameters[1])], most=99)] == [1]
