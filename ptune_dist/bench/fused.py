"""Measure the layers of a base with norms, activations and rotations as torch runs them, and as fused functions.

    python -m ptune_dist.bench.fused configs/shapes/smollm2_135m.json --layers 6 --rows 32x30 4x240 --result FILE

Three ways take turns in one process: `eager`; `functions`, which are fused functions that are not compiled; `compiled`.
Times are milliseconds of forward and backward, to the input, of all layers together.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ptune_dist.base import fused_kernels
from ptune_dist.base.fused import fuse
from ptune_dist.base.merge import merge_projections
from ptune_dist.bench.probe import synchronize, write_result

WAYS = ("eager", "functions", "compiled")
NEVER = 1 << 62


def build_models(shape: Path, num_layers: int, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """A model of random weights for each way; their projections are merged."""
    models = {}
    for way in WAYS:
        config = AutoConfig.from_pretrained(shape)
        config.num_hidden_layers = num_layers
        config.vocab_size = 128
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        merge_projections(model, {name: name for name, _ in model.named_parameters()}, set())
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    made = torch.randn(parameter.shape, dtype=dtype) * 0.02
                    setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
        if way != "eager":
            fuse(model, set(), print)
        models[way] = model
    return models


def measure(models: dict[str, PreTrainedModel], batch: int, length: int, num_repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    first = models["eager"]
    x = torch.randn(batch, length, first.config.hidden_size, dtype=first.dtype)
    for repeat in range(num_repeats + 1):
        for way, model in models.items():
            fused_kernels.MIN_CPU_ELEMENTS = 0 if way == "compiled" else NEVER
            given = x.clone().requires_grad_()
            synchronize()
            began = time.perf_counter()
            out = model.model(inputs_embeds=given, use_cache=False).last_hidden_state
            out.backward(torch.ones_like(out))
            synchronize()
            if repeat:  # the first compiles
                seconds[way].append(time.perf_counter() - began)
    return {way: 1000 * statistics.median(found) for way, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", nargs="+", default=["32x30", "4x240"], help="number of rows x tokens of each")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    found = []
    for dtype in args.dtypes:
        models = build_models(args.shape, args.layers, getattr(torch, dtype))
        for rows in args.rows:
            batch, length = (int(number) for number in rows.split("x"))
            times = measure(models, batch, length, args.repeats)
            found.append({"dtype": dtype, "rows": batch, "tokens": length, "layers": args.layers, "ms": times})
            print(found[-1], flush=True)
    write_result(str(args.result), {"fallback": fused_kernels.Fallback.reason, "measured": found})


if __name__ == "__main__":
    main()
