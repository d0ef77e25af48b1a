"""Whole tensors from flat partitions and back, the schedules, and clipping by a member's own norm."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ptune_dist.optim.optimizer import (
    Member,
    PromptOptimizer,
    build_torch_optimizer,
    cut_partitions,
    join_partitions,
    learning_rate_at,
)

SHAPES = [[(1,)], [(7, 3)], [(20, 32)], [(5, 7), (3,), (1, 1), (2, 3, 5)], [(1, 1)], [(2,), (9, 9)]]


def tensors_of(shapes) -> list[torch.Tensor]:
    """Every element different, so that a misplaced one shows."""
    first, made = 1.0, []
    for shape in shapes:
        made.append(torch.arange(first, first + math.prod(shape)).reshape(shape))
        first += math.prod(shape)
    return made


def lay_out(whole, num_ranks: int, stage: int, alignment: int) -> torch.Tensor:
    """DeepSpeed's layout, written down a second time: [N, L]."""
    if stage < 3:  # one flat buffer, padded to a multiple of the ranks (and more), cut into equal parts
        flat = torch.cat([tensor.flatten() for tensor in whole])
        size = math.ceil(flat.numel() / (num_ranks * alignment)) * num_ranks * alignment
        return torch.cat([flat, torch.zeros(size - flat.numel())]).chunk(num_ranks) if num_ranks > 1 else [
            torch.cat([flat, torch.zeros(size - flat.numel())])
        ]  # fmt: skip
    parts = [[] for _ in range(num_ranks)]  # every tensor is padded and cut by itself
    for tensor in whole:
        size = math.ceil(tensor.numel() / num_ranks)
        padded = torch.cat([tensor.flatten(), torch.zeros(size * num_ranks - tensor.numel())])
        for rank in range(num_ranks):
            parts[rank].append(padded[rank * size : (rank + 1) * size])
    tail = torch.zeros(alignment - 1)  # a longer partition than needed, as alignment makes it
    return [torch.cat([*part, tail]) for part in parts]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("alignment", [1, 2, 4])
def test_partitions_join_to_the_whole_tensors_and_are_cut_as_deepspeed_cuts_them(stage, num_ranks, shapes, alignment):
    whole = tensors_of(shapes)
    partitions = torch.stack(list(lay_out(whole, num_ranks, stage, alignment)))
    joined = join_partitions(partitions, [tensor.shape for tensor in whole], stage)
    assert all(torch.equal(a, b) for a, b in zip(joined, whole, strict=True))
    assert torch.equal(cut_partitions(whole, num_ranks, partitions.shape[1], stage), partitions)


def rates(schedule: str, warmup_steps: int, max_steps: int) -> list[float]:
    return [
        learning_rate_at(step, peak=2.0, schedule=schedule, warmup_steps=warmup_steps, max_steps=max_steps)
        for step in range(1, max_steps + 1)
    ]


def test_constant_stays_at_the_peak():
    assert rates("constant", 0, 4) == [2.0] * 4


def test_linear_falls_evenly_and_would_reach_zero_one_step_after_the_last():
    assert rates("linear", 0, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_falls_along_half_a_wave():
    assert rates("cosine", 0, 4) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_evenly_from_above_zero_to_the_peak_at_its_last_step(schedule):
    found = rates(schedule, 4, 12)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4] == pytest.approx(2.0)  # the schedule proper begins at the peak
    assert all(0 < rate <= 2.0 for rate in found)
    assert found[4:] == pytest.approx(rates(schedule, 0, 8))


def settings(optimizer: str, **more) -> SimpleNamespace:
    return SimpleNamespace(
        optimizer=optimizer, learning_rate=0.1, betas=(0.8, 0.95), eps=1e-6, momentum=0.9, weight_decay=0.01, **more
    )


def build_member(optimizer: str, max_grad_norm: float) -> Member:
    named = {
        name: nn.Parameter(torch.linspace(-1, 1, 6).reshape(shape)) for name, shape in (("a", (2, 3)), ("b", (6,)))
    }
    return Member(named, lambda parameters: build_torch_optimizer(settings(optimizer), parameters), max_grad_norm)


def test_each_name_builds_its_optimizer_with_the_configs_numbers():
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    found = {name: build_torch_optimizer(settings(name), parameters) for name in ("adamw", "adafactor", "sgd")}
    assert type(found["adamw"]) is torch.optim.AdamW and type(found["adafactor"]) is torch.optim.Adafactor
    assert type(found["sgd"]) is torch.optim.SGD
    group = found["adamw"].param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.95), 1e-6, 0.01)
    assert found["sgd"].param_groups[0]["momentum"] == 0.9
    assert all(o.param_groups[0]["lr"] == 0.1 and o.param_groups[0]["weight_decay"] == 0.01 for o in found.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 100.0])  # none, one that clips, one that never does
def test_a_member_moves_as_torch_with_clip_grad_norm(optimizer, max_grad_norm):
    member = build_member(optimizer, max_grad_norm)
    plain = [nn.Parameter(p.detach().clone()) for p in member.whole]
    reference = build_torch_optimizer(settings(optimizer), plain)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        grads = [torch.randn(p.shape, generator=generator) for p in plain]
        member.step([grad.clone() for grad in grads])
        for parameter, grad in zip(plain, grads, strict=True):
            parameter.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(plain, max_grad_norm or math.inf)
        reference.step()
        assert member.grad_norm == pytest.approx(norm.item(), rel=1e-6)  # before clipping
        for ours, theirs in zip(member.whole, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_member_is_whole_float32_and_its_own_whatever_it_was_made_from():
    parameter = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    member = Member({"a": parameter}, lambda ps: build_torch_optimizer(settings("sgd"), ps), 1.0)
    member.step([torch.ones(2, 2)])
    assert member.whole[0].dtype == torch.float32 and not torch.equal(member.whole[0], torch.ones(2, 2))
    assert torch.equal(parameter, torch.ones(2, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    member = build_member("adamw", 1.0)
    before = [p.detach().clone() for p in member.whole]
    member.step([torch.full((2, 3), bad), torch.ones(6)])
    assert "gradient" in member.fault
    assert all(torch.equal(a, b) for a, b in zip(before, member.whole, strict=True))
    assert not member.torch_optimizer.state


def test_a_step_that_leaves_the_finite_is_taken_back():
    member = build_member("sgd", 0.0)
    before = [p.detach().clone() for p in member.whole]
    member.torch_optimizer.param_groups[0]["lr"] = 1e38
    member.step([torch.ones(2, 3), torch.full((6,), 100.0)])
    assert "prompt" in member.fault
    assert all(torch.equal(a, b) for a, b in zip(before, member.whole, strict=True))


def test_a_fault_is_that_of_the_last_step_alone():
    member = build_member("adamw", 1.0)
    member.step([torch.full((2, 3), math.nan), torch.ones(6)])
    member.step([torch.ones(2, 3), torch.ones(6)])
    assert member.fault is None


def test_only_members_that_move_are_moved():
    members = {name: build_member("adamw", 1.0) for name in ("one", "two")}
    start = [p.detach().clone() for p in members["one"].whole]
    masters = {name: [nn.Parameter(p.detach().clone()) for p in member.whole] for name, member in members.items()}
    optimizer = PromptOptimizer(members, masters, stage=0, world_size=1, device=torch.device("cpu"))
    optimizer.is_ready, members["one"].moves = True, False
    for parameter in (p for own in masters.values() for p in own):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, moved in (("one", False), ("two", True)):
        found = zip(start, members[name].whole, masters[name], strict=True)
        assert all(torch.equal(whole, master) and torch.equal(p, whole) != moved for p, whole, master in found)
    assert not members["one"].torch_optimizer.state
