"""Make a base for benchmarks from a shape: its config.json, a tokenizer and, on request, files of random weights.

`python -m ptune_dist.bench.shapes configs/shapes/llama_800m.json --out runs/base --weights bfloat16`
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ptune_dist.bench.data import SHAPE
from ptune_dist.families.find import open_any

SHARD_BYTES = 1 << 30


def write_shape(shape: Path, out: Path) -> None:
    """Write a folder with the shape and the tokenizer of the benchmarks."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shape, out / "config.json")
    for file in SHAPE.glob("tokenizer*.json"):
        shutil.copyfile(file, out / file.name)


def write_weights(out: Path, dtype: torch.dtype, seed: int) -> None:
    """Write random weights to safetensors files of 1 GiB with an index; one file is in memory at a time."""
    weights = open_any(str(out), dtype=dtype, random_init=True, seed=seed).weights
    file_of: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def close() -> None:
        file = f"model-{len(set(file_of.values())) + 1:05d}.safetensors"
        save_file(shard, out / file, {"format": "pt"})
        file_of.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in weights.shapes.items():
        shard[name] = weights.read_rows(name, 0, shape[0]).to(dtype)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            close()
    if shard:
        close()
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_shape(args.shape, args.out)
    if args.weights:
        write_weights(args.out, getattr(torch, args.weights), args.seed)


if __name__ == "__main__":
    main()
