"""Measure one way to load a base on every rank: seconds, memory at the peak and afterward, bytes read and gathered.

    torchrun --nproc-per-node 2 -m ptune_dist.bench.loading SIDE --base DIR --dtype bfloat16 --result FILE

SIDE: `ours` (rank-sliced), `ours-int8`, `ours-int8-all` (head and embeddings too), `transformers` (from_pretrained
under the same ZeRO-3 JSON), `bitsandbytes` (from_pretrained with Linear8bitLt, which cannot be sharded, so every rank
has a whole copy). Each side then reads the same tokens once: equal losses show that the bases are equal.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

# This sets the environment of the process group, which transformers and DeepSpeed read when they are imported.
from ptune_dist.distributed.world import World, init_distributed, max_over_ranks  # isort: skip

import deepspeed
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from ptune_dist.base.layers import held_bytes, layers_of, parameter_size
from ptune_dist.bench.probe import held_bytes as resident_bytes
from ptune_dist.bench.probe import peak_bytes, reset_peak, write_result
from ptune_dist.families.find import open_any
from ptune_dist.zero.gathers import watch_gathers
from ptune_dist.zero.shard import Sharder, fill_sharded

SIDES = ("ours", "ours-int8", "ours-int8-all", "transformers", "bitsandbytes")
NUM_TOKENS = 64


def zero3_json(dtype: str) -> dict[str, Any]:
    """ZeRO-3 without persistent parameters, so that a pass gathers every parameter once."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def load(side: str, base: str, dtype: torch.dtype, content: dict[str, Any]) -> tuple[PreTrainedModel, int]:
    """The loaded model, and the bytes that this rank read from its files (0 if the side does not report them)."""
    if side.startswith("ours"):
        include = ["head", "embeddings"] if side.endswith("all") else []
        opened = open_any(base, dtype=dtype, int8={"include": include, "threshold": None} if "int8" in side else None)
        model = fill_sharded(opened, Sharder(content, torch.int8))
        return model, opened.weights.bytes_read
    if side == "transformers":
        keep = HfDeepSpeedConfig(content)  # transformers uses it as long as this object exists
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        del keep
        return model.eval(), 0
    quantized = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantized)
    return model.eval(), 0


@torch.no_grad()
def read_tokens(side: str, model: PreTrainedModel, content: dict[str, Any], world: World) -> float:
    """The loss of some tokens, the same on every rank."""
    ids = torch.arange(2, 2 + NUM_TOKENS, device=world.device)[None]
    if side == "bitsandbytes":
        return model(input_ids=ids, labels=ids).loss.item()
    deepspeed.utils.set_z3_leaf_modules(model, [type(layers_of(model)[0])])
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=content)
    return engine(input_ids=ids, labels=ids).loss.item()


def measure(side: str, base: str, dtype: str, world: World) -> dict[str, Any]:
    """The side's figures, each the largest of any rank. Collective: every rank must call."""
    content = zero3_json(dtype)
    gathers = watch_gathers()
    gc.collect()
    memory_before = resident_bytes()
    read_before = file_bytes_read()
    reset_peak()
    torch.distributed.barrier()
    began = time.perf_counter()
    model, asked = load(side, base, getattr(torch, dtype), content)
    load_s = time.perf_counter() - began
    peak = peak_bytes()
    read = file_bytes_read() - read_before
    assert memory_before is not None and peak is not None, "this system does not report the memory of a process"
    figures = {"load_s": load_s, "peak_over_base_bytes": peak - memory_before, **describe_size(model, world)}
    gathered = gathers.copy()
    loss = read_tokens(side, model, content, world)
    figures["gathered_bytes"] = gathers.since(gathered).num_bytes
    figures["num_gathers"] = gathers.since(gathered).num
    if asked:
        stored = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
        figures |= {"bytes_asked": asked, "read_of_share": max(asked, read) / (stored / world.size)}
    return {name: max_over_ranks(value, world) for name, value in figures.items()} | {"loss": loss, "side": side}


def describe_size(model: PreTrainedModel, world: World) -> dict[str, float]:
    """Bytes that this rank holds of the base, and their ratio to this rank's share of a float32 and a bfloat16 base."""
    held = held_bytes(model)
    num_parameters = sum(parameter_size(p) for p in model.parameters() if p.dtype != torch.int32)  # without scales
    return {
        "base_bytes": held,
        "of_float32": held / (4 * num_parameters / world.size),
        "of_bfloat16": held / (2 * num_parameters / world.size),
        "largest_tensor_bytes": max(parameter_size(p) * p.element_size() for p in model.parameters()),
    }


def file_bytes_read() -> int:
    """Bytes that this process has read with read calls, not through memory maps (proc(5), `rchar`)."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--base", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--result", required=True)
    args = parser.parse_args()
    world = init_distributed()
    result = measure(args.side, args.base, args.dtype, world)
    if world.is_main:
        write_result(args.result, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
