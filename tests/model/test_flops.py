"""The operations that a unit is estimated to take, against those that torch counts in a pass and back."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ptune_dist.data.batches import Unit, collate
from ptune_dist.data.examples import Examples
from ptune_dist.distributed.world import World
from ptune_dist.families import FAMILIES
from ptune_dist.model.flops import UnitFlops
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.optim.prompt_state import PromptState
from ptune_dist.prompts.late_prompt import LatePrompt
from ptune_dist.prompts.method import Method
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.zero.engine import Engine
from ptune_dist.zero.passes import WholePasses

WIDTH = 128
LAYERS = 4
MEMBERS = 3
CASES = {
    "prefix": ("causal", "prefix", 0),
    "late": ("causal", "prefix", 3),
    "infix": ("causal", "infix", 0),
    "late infix": ("causal", "infix", 2),
    "encoder": ("seq2seq", "encoder", 0),
    "decoder": ("seq2seq", "decoder", 0),
}


def build_engine(family: str, placement: str, start: int) -> Engine:
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 500, "pad_token_id": 0}
    if family == "causal":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS} | heads
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, **vocabulary))
    else:
        shape = {"d_model": WIDTH, "d_ff": 4 * WIDTH, "num_layers": LAYERS, "num_heads": 2, "d_kv": WIDTH // 2}
        config = AutoConfig.for_model("t5", **shape, **vocabulary, decoder_start_token_id=0)
        base = AutoModelForSeq2SeqLM.from_config(config)
    vectors = [torch.randn(2, WIDTH) for _ in range(MEMBERS)]
    prompts: list[Method] = [LatePrompt(some, start) if start else PromptTuning(some) for some in vectors]
    model = FAMILIES[family].model_class(base.eval().requires_grad_(False), prompts, CrossEntropy(), placement)
    world = World(0, 1, torch.device("cpu"))
    return Engine(model, WholePasses(), PromptState({}, world), world, 0)


def draw_examples(placement: str) -> Examples:
    """One long input with a short target and one short input with a long one; nearly all of an input is context."""
    lengths, num_targets = np.array([64, 48]), np.array([8, 24])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    has_contexts = placement in ("infix", "decoder")
    num_context = lengths - num_targets - (placement == "infix") if has_contexts else np.zeros(2, np.int64)
    ids = np.random.default_rng(0).integers(5, 400, offsets[-1]).astype(np.int32)
    return Examples(ids, offsets, num_targets, np.zeros(2, bool), str, num_context)


@pytest.mark.parametrize("unit", [(0, (0, 1, 2)), (0, (1,)), (1, (0, 1))], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_unit_takes_about_as_many_operations_as_estimated(case, unit: Unit):
    family, placement, start = CASES[case]
    engine = build_engine(family, placement, start)
    examples = draw_examples(placement)
    batch = engine.prepare(collate(examples, [[unit]], 0, pad_id=0))
    engine.model.losses(engine.contexts.hold(batch))  # layers are looked at once
    with FlopCounterMode(display=False) as counter:
        engine.model.losses(engine.contexts.hold(batch)).sum().backward()
    assert UnitFlops(engine.model)(unit, examples) == pytest.approx(counter.get_total_flops(), rel=0.3)
