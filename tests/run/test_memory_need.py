"""The memory of a training is known before a weight is read, and names the micro-batch that fits."""

import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from ptune_dist.base.memory_check import GIB, Room
from ptune_dist.base.recompute import DEFAULTS, SECTION
from ptune_dist.data.batches import Batch
from ptune_dist.data.examples import Examples
from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.model.peak_bytes import measure_pass
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.run.memory_need import Workload, fit_micro_batch
from tests.data.test_batches import alone

LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
LENGTH = 512
SHORT = 0.22  # GiB
ZERO_0 = {"zero_optimization": {"stage": 0}}


def make_base(num_layers: int, dtype=torch.bfloat16, **shape):
    config = AutoConfig.for_model("llama", num_hidden_layers=num_layers, vocab_size=1000, **LLAMA_70B | shape)
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return base.eval().requires_grad_(False)


def build_model(base, placement: str = "prefix"):
    prompt = PromptTuning(torch.zeros(20, base.config.hidden_size))
    return FAMILIES["causal"].model_class(base, [prompt], CrossEntropy(), placement)


def rows_of(count: int) -> Batch:
    nothing = np.zeros(0, np.int32)
    rest, target = np.full(LENGTH - 15, 5, np.int32), np.full(16, 5, np.int32)
    return Batch([nothing] * count, [rest] * count, [target] * count, [(row, 0) for row in range(count)], 1)


def test_a_70b_keeps_two_hundred_gigabytes_of_8192_positions_and_recomputation_a_tenth():
    batch = rows_of(4)
    positions = 4 * LENGTH + 20
    per_layer = {}
    for name, settings in (("kept", None), ("recomputed", DEFAULTS)):
        two, four = (measure_pass(build_model, make_base(num), batch, settings) for num in (2, 4))
        per_layer[name] = (four - two) / 2 / positions
    # by hand: float32 copies in two norms, q, k, v, what attention gives, gate, up, their product
    assert 80 * 8192 * per_layer["kept"] / 1e9 == pytest.approx(195, rel=0.1)
    assert per_layer["recomputed"] == pytest.approx(2 * 8192, rel=0.01)  # a layer's input


def build_work(**options) -> Workload:
    base = make_base(
        2, torch.float32, hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=4
    )
    lengths = np.random.default_rng(0).integers(100, 200, 64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.full(offsets[-1], 5, np.int32)
    examples = Examples(ids, offsets, np.full(64, 8, np.int32), np.zeros(64, bool), str)
    rows = SimpleNamespace(
        examples=examples, of_step=lambda *_: {"a": list(range(32))}, units=lambda chosen, _: alone(chosen["a"])
    )
    settings = {"members": ["a"], "batch_size": 32, "world_size": 1, "on_host": False} | options
    return Workload(base, build_model, rows, **settings)


def settle(asked: int | None, free_gib: float, content: dict | None = None, **options) -> int:
    room = Room(0, int(free_gib * GIB), "on GPU 0")
    return fit_micro_batch(asked, build_work(**options), room, content or ZERO_0, {"base": GIB // 8})


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        settle(*args, **options)
    return str(caught.value)


def test_what_does_not_fit_is_refused_with_the_largest_that_does():
    message = refusal(4096, SHORT)
    assert message.startswith("train.micro_batch_tokens: 4096 needs about ") and "\n" not in message
    assert "on GPU 0" in message and "0.2 GiB are free" in message and "base 0.1" in message
    fitting = int(re.search(r"the largest that fits is (\d+)", message)[1])
    assert fitting % 128 == 0 and settle(fitting, SHORT) == fitting
    assert "needs about" in refusal(2 * fitting + 1024, SHORT)


def test_auto_takes_the_largest_that_fits_but_no_more_than_a_step_has():
    taken = [settle(None, free) for free in (SHORT, 0.3, 0.4)]
    assert taken == sorted(taken) and taken[0] < taken[-1]
    assert f"the largest that fits is {taken[0]}" in refusal(4096, SHORT)
    assert settle(None, 100) == 8192  # a step has less
    assert settle(None, 100, batch_size=64) > 8192  # a step has more


def test_recomputation_is_named_where_nothing_fits_and_where_it_is_off():
    message = refusal(4096, 0.13)
    assert "none fits" in message and SECTION in message and "4096 positions" in message
    recomputing = ZERO_0 | {SECTION: {}}
    assert "none fits: use more ranks" in refusal(None, 0.13, content=recomputing)
    assert settle(None, SHORT, content=recomputing) > settle(None, SHORT)


def test_a_step_smaller_than_the_micro_batch_needs_what_the_step_has():
    assert settle(1 << 20, SHORT, batch_size=2) == 1 << 20


def test_what_surely_fits_is_not_measured(monkeypatch):
    monkeypatch.setattr("ptune_dist.run.memory_need.measure_pass", partial(pytest.fail, "measured"))
    assert settle(8192, 1000) == 8192


def test_an_architecture_that_cannot_be_measured_is_estimated(monkeypatch):
    measured = settle(None, 0.3)
    monkeypatch.setattr("ptune_dist.run.memory_need.measure_pass", lambda *_: 1 / 0)
    assert settle(None, 0.3) == pytest.approx(measured, rel=0.6)
