"""Make bases for benchmarks from shapes: config.json, a tokenizer and, on request, files of random weights.

`python -m ptune_dist.bench.shapes configs/shapes/llama_800m.json --out runs/base --weights bfloat16` makes one;
`python -m ptune_dist.bench.shapes configs/shapes/*.json --into runs/bases` makes runs/bases/NAME of each, and
runs/bases/NAME_2_layers with two of its layers, which compiles what the whole base compiles. Only weights need torch.
"""

import argparse
import json
import shutil
from pathlib import Path

TOKENIZER = Path("configs/shapes/llama_40m")  # the folder with the tokenizer of the benchmarks
SHARD_BYTES = 1 << 30


def write_shape(shape: Path, out: Path, num_layers: int | None = None) -> None:
    """Write a folder with the shape, or its first layers alone, and the tokenizer of the benchmarks."""
    out.mkdir(parents=True, exist_ok=True)
    content = json.loads(shape.read_text(encoding="utf-8"))
    if num_layers:
        content["num_hidden_layers"] = num_layers
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in TOKENIZER.glob("tokenizer*.json"):
        shutil.copyfile(file, out / file.name)


def write_weights(out: Path, precision: str, seed: int) -> None:
    """Write random weights to safetensors files of 1 GiB with an index; one file is in memory at a time."""
    import torch
    from safetensors.torch import save_file

    from ptune_dist.families.find import open_any

    dtype = getattr(torch, precision)
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
    parser.add_argument("shapes", type=Path, nargs="+")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="the folder of one base")
    where.add_argument("--into", type=Path, help="the folder in which each shape gets two folders")
    parser.add_argument("--weights", choices=["float32", "bfloat16", "float16"], help="with --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.into:
        for shape in args.shapes:
            write_shape(shape, args.into / shape.stem)
            write_shape(shape, args.into / f"{shape.stem}_2_layers", num_layers=2)
        return
    if len(args.shapes) > 1:
        parser.error("--out is the folder of one base: use --into for several")
    write_shape(args.shapes[0], args.out)
    if args.weights:
        write_weights(args.out, args.weights, args.seed)


if __name__ == "__main__":
    main()
