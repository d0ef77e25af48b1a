"""Prefix tuning of encoder-decoders as runs: step for step PEFT's, at every stage, in sweeps, resumed and exported."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from ptune_dist.base.recompute import DEFAULTS
from ptune_dist.prompts.peft_prefix import for_decoder
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from tests.numerics.methods import write_run
from tests.numerics.plain import NUM_VIRTUAL, peft_method_curve
from tests.numerics.test_curves import curve, train_all, zero_json

pytestmark = pytest.mark.long
PROMPT = {"method": "prefix_tuning"}
DECODER = PROMPT | {"placement": "decoder"}


def start_of(base: Path, num_stacks: int = 1) -> dict[str, torch.Tensor]:
    """Random keys and values of the layers of so many stacks."""
    config = AutoConfig.from_pretrained(base)
    num_heads = config.num_attention_heads
    width = config.hidden_size // num_heads
    shape = (num_stacks * config.num_hidden_layers, NUM_VIRTUAL, num_heads, width)
    draw = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=draw) for name in ("prefix_keys", "prefix_values")}


def peft_curve_of(base: Path) -> list[float]:
    """PEFT's own prefix, with as many layers as let it give each of the decoder's one of its own."""
    from peft import PrefixTuningConfig

    adapter = PrefixTuning.to_peft(start_of(base))
    found = for_decoder(adapter, adapter.settings)
    settings = PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL, num_layers=found.settings["num_layers"])
    return peft_method_curve(base, settings, {"embedding.weight": found.prompt_embeddings}, "seq2seq")


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("seq2seq")
    t5 = tiny_bases["t5"]
    int8 = {"model": {"quantization": "int8"}}
    bf16 = {"model": {"dtype": "bfloat16"}}
    recomputed = {"deepspeed": zero_json(3) | {"activation_checkpointing": DEFAULTS}}
    sharded = {"deepspeed": zero_json(3)}
    small = {"train": {"micro_batch_tokens": 60}}
    specs = [write_run(root, kind, tiny_bases[kind], DECODER, start_of(tiny_bases[kind])) for kind in ("t5", "bart")]
    cases = {"1": {"deepspeed": zero_json(1)}, "2": {"deepspeed": zero_json(2)}, "3": sharded, "recomputed": recomputed}
    cases |= {"small": small, "cached": sharded | {"train": {"context_cache_gib": 0.01}}}
    specs += [write_run(root, f"t5-{name}", t5, DECODER, start_of(t5), **more) for name, more in cases.items()]
    cases = {"0": {}, "3": sharded, "recomputed": recomputed, "small": sharded | small}
    cases |= {"int8-0": int8, "int8-3": int8 | sharded, "bf16-0": bf16, "bf16-3": bf16 | sharded}
    specs += [write_run(root, f"both-{name}", t5, PROMPT, start_of(t5, 3), **more) for name, more in cases.items()]
    encoder = PROMPT | {"placement": "encoder"}
    cases = {"0": {}, "3": sharded}
    bart = tiny_bases["bart"]
    specs += [write_run(root, f"encoder-{name}", bart, encoder, start_of(bart), **more) for name, more in cases.items()]
    return train_all(specs, root, num_ranks=2)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_decoders_prefix_trains_as_under_peft(runs, tiny_bases, kind):
    wanted = peft_curve_of(tiny_bases[kind])
    assert wanted[-1] < wanted[0]
    assert curve(runs[kind]) == pytest.approx(wanted, rel=1e-5)
    hashes = json.loads((runs[kind] / "base_hashes.json").read_text())
    assert hashes["after"] == hashes["before"] and hashes["before"]


def test_the_curve_depends_on_no_stage_and_no_way_of_computing(runs):
    for name in ("1", "2", "3", "recomputed", "small", "cached"):
        assert curve(runs[f"t5-{name}"]) == pytest.approx(curve(runs["t5"]), rel=1e-5), name
    wanted = curve(runs["both-0"])
    assert wanted[-1] < wanted[0]
    for name in ("3", "recomputed", "small"):
        assert curve(runs[f"both-{name}"]) == pytest.approx(wanted, rel=1e-5), name
    assert curve(runs["both-int8-3"]) == pytest.approx(curve(runs["both-int8-0"]), rel=1e-5)
    assert curve(runs["both-int8-0"]) == pytest.approx(wanted, rel=0.1)
    assert curve(runs["both-bf16-3"]) == pytest.approx(curve(runs["both-bf16-0"]), rel=0.02)
    assert curve(runs["both-bf16-0"]) == pytest.approx(wanted, rel=0.05)
    assert curve(runs["encoder-3"]) == pytest.approx(curve(runs["encoder-0"]), rel=1e-5)
