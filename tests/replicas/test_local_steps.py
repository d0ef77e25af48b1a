"""Local steps between exchanges: the curve of a plain loop of the same algorithm, whatever nodes compute it."""

import signal
from itertools import islice
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from ptune_dist.run.checkpoint import list_checkpoints
from tests.conftest import TINY
from tests.numerics.plain import (
    BATCH,
    NUM_VIRTUAL,
    PEAK,
    initial_vectors,
    load_plain,
    padded_batches,
    with_prompt,
    write_initial_prompt,
)
from tests.replicas.nodes import VALIDATION, ZERO3, Cluster, train_alone
from tests.replicas.test_replicas import check_same

pytestmark = pytest.mark.long

STEPS, EVERY, WORKERS = 18, 4, 2
LOCAL = {
    "max_steps": STEPS, "batch_size": BATCH, "learning_rate": PEAK, "schedule": "constant", "num_blocks": 4,
    "sync_every": EVERY, "num_workers": WORKERS, "outer_lr": 0.7, "outer_momentum": 0.9,
}  # fmt: skip
SECTIONS = {
    "data": VALIDATION,
    "evaluate": {"every": 6, "max_examples": 8, "num_samples": 0},
    "checkpoint": {"every": 3},
}


def width_of(base: PreTrainedModel) -> int:
    return base.get_input_embeddings().get_parameter("weight").shape[1]


def plain_local_steps() -> tuple[list[float], torch.Tensor]:
    """Losses and the last prompt of DiLoCo with averaged inner states: AdamW, clipping at 1, outer SGD by torch."""
    base = load_plain(TINY / "causal")
    prompt = torch.nn.Parameter(initial_vectors(width_of(base)))
    outer = torch.optim.SGD([prompt], lr=LOCAL["outer_lr"], momentum=LOCAL["outer_momentum"], nesterov=True)
    steps = list(islice(padded_batches(AutoTokenizer.from_pretrained(TINY / "causal")), STEPS))
    state: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    for period in (steps[i : i + EVERY] for i in range(0, STEPS, EVERY)):
        ends: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        sums = [0.0] * len(period)
        for worker in range(WORKERS):
            own = torch.nn.Parameter(prompt.detach().clone())
            inner = torch.optim.AdamW([own], lr=PEAK, weight_decay=0.0)
            inner.state[own] |= {key: tensor.clone() for key, tensor in state.items()}
            for number, step in enumerate(period):
                ids, mask, labels = (part[worker::WORKERS] for part in step)
                logits = base(**with_prompt(base, own, ids, mask)).logits[:, NUM_VIRTUAL - 1 : -1].flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
                inner.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([own], 1.0)
                inner.step()
                sums[number] += loss.item() * int((labels >= 0).sum())
            ends.append((own.detach(), inner.state[own]))
        losses += [total / int((step[2] >= 0).sum()) for total, step in zip(sums, period, strict=True)]
        state = {key: torch.stack([end[key] for _, end in ends]).mean(0) for key in ends[0][1]}
        prompt.grad = prompt.detach() - torch.stack([vectors for vectors, _ in ends]).mean(0)
        outer.step()
    return losses, prompt.detach()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict[str, Any]:
    path = write_initial_prompt(
        width_of(load_plain(TINY / "causal")), tmp_path_factory.mktemp("start") / "start.safetensors"
    )
    return {"num_virtual_tokens": NUM_VIRTUAL, "init": "file", "init_file": str(path)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, start) -> Cluster:
    """The run of one node, which computes all workers."""
    return train_alone(tmp_path_factory.mktemp("alone") / "run", train=LOCAL, prompt=start, **SECTIONS)


def last_prompt(cluster: Cluster) -> torch.Tensor:
    last = list_checkpoints(cluster.run / "checkpoints")[-1]
    (found,) = load_file(last / "prompt.safetensors").values()
    return found


def test_one_node_trains_as_a_plain_loop_and_saves_and_evaluates_at_exchanges(alone):
    losses, prompt = plain_local_steps()
    assert alone.losses() == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(last_prompt(alone), prompt, rtol=1e-4, atol=1e-5)
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(alone.run / "checkpoints")]
    assert steps == [4, 8, 12, 16, 18]
    evaluated = (alone.run / "evaluations.jsonl").read_text()
    assert [f'"step": {step},' in evaluated for step in (0, 8, 12, 18)] == [True] * 4
    assert [step for step in alone.steps() if "exchange_s" in alone.lines()[step - 1]] == [4, 8, 12, 16, 18]


def test_a_node_is_killed_within_a_period_and_another_one_joins(tmp_path, alone, start):
    cluster = Cluster(tmp_path / "killed", train={**LOCAL, "min_nodes": 2}, prompt=start, **SECTIONS)
    nodes = [cluster.start(name) for name in ("first", "second")]
    cluster.wait_for_step(1)
    nodes[0].kill()
    nodes.append(cluster.start("third"))
    assert [node.finish() for node in nodes] == [{-signal.SIGKILL}, {0}, {0}], nodes[1].output + nodes[2].output
    check_same(cluster, alone)
    log = (cluster.run / "train.log").read_text()
    assert "without first" in log and "third joins" in log


def test_a_run_that_is_resumed_at_an_exchange_is_the_undisturbed_one(tmp_path, alone, start):
    folder = tmp_path / "resumed"
    train_alone(folder, "train.max_steps=12", train=LOCAL, prompt=start, **SECTIONS)
    resumed = train_alone(folder, train=LOCAL, prompt=start, **SECTIONS)
    assert resumed.steps() == alone.steps()
    assert resumed.losses() == alone.losses() and resumed.final() == alone.final()


@pytest.mark.extended
def test_worlds_of_two_ranks_under_zero3_take_the_local_steps_of_one_rank(tmp_path, start):
    train = {**LOCAL, "min_nodes": 2}
    cluster = Cluster(tmp_path / "two", 2, train=train, prompt=start, deepspeed=ZERO3, **SECTIONS)
    nodes = [cluster.start(name) for name in "ab"]
    assert [node.finish() for node in nodes] == [{0}, {0}], nodes[0].output + nodes[1].output
    one_rank = train_alone(tmp_path / "one", train=LOCAL, prompt=start, deepspeed=ZERO3, **SECTIONS)
    check_same(cluster, one_rank)


@pytest.mark.extended
def test_a_member_whose_local_steps_fail_is_stopped_and_the_others_end_as_alone(tmp_path, alone, start):
    fails = {"train.learning_rate": 1e30, "train.optimizer": "sgd", "train.weight_decay": 1e6}
    sweep = [{"train.learning_rate": PEAK}, fails]
    both = train_alone(tmp_path / "both", train=LOCAL, prompt=start, sweep=sweep, **SECTIONS)
    assert "is stopped at step" in (both.run / "train.log").read_text()
    (sound,) = [path for path in (both.run / "members").iterdir() if "1e+30" not in path.name]
    found = load_file(sound / "prompt" / "prompt.safetensors")
    expected = load_file(alone.run / "prompt" / "prompt.safetensors")
    assert all(torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5) for name, tensor in expected.items())
