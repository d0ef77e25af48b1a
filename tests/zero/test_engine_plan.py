"""How large the passes of a step are on a CPU."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptune_dist.distributed.world import World
from ptune_dist.families import FAMILIES
from ptune_dist.model.flops import UnitFlops
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.optim.prompt_state import PromptState
from ptune_dist.prompts.late_prompt import LatePrompt
from ptune_dist.prompts.method import Method
from ptune_dist.zero.engine import MOST_POSITIONS_ON_CPU, Engine
from ptune_dist.zero.passes import WholePasses
from tests.gpu_offline.work_steps import draw_examples
from tests.numerics.prefixes import draw_prefix


def build_engine(placement: str, device: str = "cpu", start_layer: int = 0, world_size: int = 1) -> Engine:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", intermediate_size=8, vocab_size=40, **shape))
    prompts: list[Method] = [draw_prefix(base, 5, seed=seed) for seed in range(8)]
    if start_layer:
        prompts = [LatePrompt(torch.randn(5, 16), start_layer) for _ in range(8)]
    model = FAMILIES["causal"].model_class(base.eval().requires_grad_(False), prompts, CrossEntropy(), placement)
    world = World(0, world_size, torch.device(device))
    return Engine(model, WholePasses(), PromptState({}, world), world, 0)


@pytest.mark.parametrize(
    ("case", "asked", "most"),
    [
        *((name, 1_000_000, MOST_POSITIONS_ON_CPU) for name in ("cpu", "sharded")),
        ("cpu", 1000, 1000),
        *((name, 1_000_000, None) for name in ("cuda", "infix")),
    ],
)
def test_passes_are_small_on_a_cpu_and_read_every_row_once(case, asked, most):
    placement = "infix" if case == "infix" else "prefix"
    engine = build_engine(placement, "cuda" if case == "cuda" else "cpu")
    engine.is_sharded = case == "sharded"
    examples = draw_examples(placement)
    units = [(example, tuple(range(8))) for example in range(len(examples))] * 12
    plan = engine.plan(units, examples, asked)
    sizes = [engine.model.count_positions(shares[0], examples) for shares in plan]
    assert max(sizes) <= most if most else len(sizes) == 1
    read = [(example, member) for shares in plan for example, members in shares[0] for member in members]
    assert np.array_equal(np.bincount([example for example, _ in read]), np.full(len(examples), 8 * 12))


def test_members_that_share_work_read_a_row_in_one_pass(monkeypatch):
    monkeypatch.setattr("ptune_dist.zero.engine.MOST_POSITIONS_ON_CPU", 1)
    examples = draw_examples("infix")
    units = [(example, tuple(range(8))) for example in range(len(examples))]
    read = [units for shares in build_engine("infix").plan(units, examples, 1_000_000) for units in shares[0]]
    assert sorted(read) == sorted(units)
    apart = [units for shares in build_engine("prefix").plan(units, examples, 1_000_000) for units in shares[0]]
    assert len(apart) == 8 * len(units)


def test_members_of_a_row_are_read_by_two_ranks_where_whole_rows_are_uneven():
    engine = build_engine("prefix", start_layer=1, world_size=2)
    examples = draw_examples("prefix")
    flops = UnitFlops(engine.model)
    (shares,) = engine.plan([(example, tuple(range(8))) for example in range(3)], examples, 1_000_000)
    loads = [sum(flops(unit, examples) for unit in share) for share in shares]
    assert max(loads) <= 1.1 * min(loads)
    assert len(shares[0] + shares[1]) == 4
