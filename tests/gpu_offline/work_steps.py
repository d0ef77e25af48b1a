"""Optimizer steps on a GPU, from the thread that prepares batches to the agreement on stopping: what waits for what."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

from ptune_dist.data.batches import collate
from ptune_dist.data.examples import Examples
from ptune_dist.distributed.world import World
from ptune_dist.evaluation.during_training import agree_on_stop
from ptune_dist.families import FAMILIES
from ptune_dist.model import attention_flex
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.optim.loss_scale import LossScale
from ptune_dist.optim.optimizer import build_torch_optimizer
from ptune_dist.optim.prompt_state import Member, PromptState
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.zero.engine import Engine
from ptune_dist.zero.passes import WholePasses
from tests.gpu_offline.counting import CountingFakeTensors, report
from tests.optim.states import settings

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
CUDA = torch.device("cuda", 0)
NUM_ROWS = 24


class StrictFakeTensors(CountingFakeTensors):
    """Counts copies to the GPU for which the host waits too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func._schema.name == "aten::_to_copy" and not args[0].is_cuda and is_cuda(given.get("device")):
            if not given.get("non_blocking"):
                self.counts.waits.append("upload")
        return super().__torch_dispatch__(func, types, args, kwargs)


def is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def fake_machine(mode: CountingFakeTensors) -> None:
    """What a fake tensor, or a process without peers, cannot do."""

    def read(tensor: torch.Tensor) -> list[bool]:
        if tensor.is_cuda:
            mode.counts.waits.append("tolist")
        return [tensor.dtype == torch.bool] * tensor.numel()  # sound members, losses of 0, nobody who asks to stop

    fake: Any = FakeTensor
    fake.tolist = read
    plain: Any = torch.Tensor
    plain.pin_memory = lambda tensor, device=None: torch.empty_like(tensor)
    distributed: Any = torch.distributed
    distributed.all_reduce = lambda *_, **__: None
    flex: Any = attention_flex
    flex.compiled_attend_blocks = lambda: lambda q, k, v, tables, scale: q * (k.mean() + v.mean())


def draw_examples(placement: str) -> Examples:
    draw = np.random.default_rng(0)
    lengths = draw.integers(12, 40, NUM_ROWS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    num_targets = draw.integers(2, 6, NUM_ROWS).astype(np.int64)
    num_context = lengths - num_targets if placement == "infix" else np.zeros(NUM_ROWS, np.int64)
    ids = draw.integers(5, 250, offsets[-1]).astype(np.int32)
    return Examples(ids, offsets, num_targets, np.zeros(NUM_ROWS, bool), str, num_context, None)


def build_model(placement: str, method: str, precision: str) -> PromptedModel:
    """Two prompts over a base without memory."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=getattr(torch, precision))
    base.eval().requires_grad_(False)
    if method == "prefix_tuning":
        prompts = [PrefixTuning(*torch.randn(2, 2, 5, 2, 16)) for _ in range(2)]
    else:
        prompts = [PromptTuning(torch.randn(5, 64)) for _ in range(2)]
    model = FAMILIES["causal"].model_class(base, prompts, CrossEntropy(), placement)
    model.prompts.to("meta")
    return model


def build_engine(model: PromptedModel, precision: str) -> Engine:
    """An engine on the GPU, in a world of two ranks."""
    model.to_empty(device=CUDA)
    world = World(0, 2, CUDA)
    members = {}
    for number in range(2):
        named = model.trainable(number)
        optimizer = build_torch_optimizer(settings("adamw"), list(named.values()))
        members[f"member{number}"] = Member(named, optimizer, max_grad_norm=1.0)
    state = PromptState(members, world, LossScale({}) if precision == "float16" else None)
    return Engine(model, WholePasses(), state, world, 0)


def take_step(engine: Engine, examples: Examples, micro_batch_tokens: int) -> int:
    """One step as `train.take_step` makes it; the number of micro-batches."""
    units = [(example, (0, 1)) for example in range(len(examples))]
    plan = engine.plan(units, examples, micro_batch_tokens)
    scales = torch.ones(2, device=CUDA)
    totals = torch.zeros(2, device=CUDA)
    for shares in plan:
        totals += engine.accumulate(engine.prepare(collate(examples, shares, 0, 1)), scales=scales)
    _, norms = engine.measure(engine.members, totals)
    engine.step(dict.fromkeys(engine.members, 0.1), norms)
    watch: Any = SimpleNamespace(requested=False)
    agree_on_stop(watch, None, engine.world)
    return len(plan)


def count_waits(placement: str, method: str, precision: str) -> dict[str, Any]:
    """What the host waits for in a step, by name, and how many micro-batches it has."""
    model = build_model(placement, method, precision)
    with StrictFakeTensors() as mode:
        fake_machine(mode)
        engine = build_engine(model, precision)
        examples = draw_examples(placement)
        found = []
        size = 80 if placement == "infix" else 300
        take_step(engine, examples, size)  # the optimizer makes its state
        counts = report(lambda: found.append(take_step(engine, examples, size)), mode)["counts"]
        return {"waits": Counter(counts["waits"]), "uploads": counts["uploads"], "micro_batches": found[0]}
