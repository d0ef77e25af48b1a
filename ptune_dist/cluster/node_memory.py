"""Whether one node holds a base, for `train.nodes: auto`, from the headers of its files and without torch."""

import json
import math
import re
from pathlib import Path
from typing import Any

import psutil

from ptune_dist.cluster.torch_builds import ask_nvidia_smi
from ptune_dist.config.deepspeed_json import load_deepspeed_json
from ptune_dist.config.schema import Config

GIB = 1 << 30
MIB = 1 << 20
SAFE_SHARE = 0.75  # of a node's memory that the base may take: the rest is for activations
BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}


def choose_nodes(config: Config, num_gpus: int) -> tuple[str, str]:
    """`train.nodes` for `auto` on several nodes, `replicas` where each holds the base, and why."""
    place = offload_device(config)
    if place == "nvme":
        return "replicas", "the base is on each node's own disk"
    numbers = count_numbers(config.model.path)
    if numbers is None:
        return "one_world", f"how large {config.model.path} is cannot be told from its files"
    needed = numbers * (BYTES_PER_NUMBER[config.model.dtype] if config.model.quantization == "none" else 1)
    on_gpus = num_gpus > 0 and place != "cpu"
    there = measure_gpus(num_gpus) if on_gpus else psutil.virtual_memory().total
    what = f"{num_gpus} GPUs" if on_gpus else "host"
    facts = f"the base takes {needed / GIB:.3g} GiB of the {there / GIB:.3g} GiB of a node's {what}"
    return ("replicas" if needed <= SAFE_SHARE * there else "one_world"), facts


def offload_device(config: Config) -> str:
    """Where DeepSpeed's JSON places the base: "cpu", "nvme" or "none". Raises UserError."""
    content: dict[str, Any] = load_deepspeed_json(config.deepspeed)
    return str((content.get("zero_optimization", {}).get("offload_param") or {}).get("device", "none"))


def measure_gpus(num_gpus: int) -> int:
    """Bytes of the memory of that many of this node's GPUs, 0 if nvidia-smi does not tell."""
    sizes = [int(size) * MIB for size in re.findall(r"^(\d+) MiB", ask_nvidia_smi("memory.total"), re.MULTILINE)]
    return num_gpus * min(sizes, default=0)


def count_numbers(path: str) -> int | None:
    """How many numbers the weights of a base have; None where it has no safetensors files here."""
    files = sorted(find_folder(path).glob("*.safetensors"))
    try:
        return sum(count_in_file(file) for file in files) if files else None
    except (OSError, ValueError, KeyError):
        return None


def count_in_file(file: Path) -> int:
    """From the header of a safetensors file: 8 bytes with its length, then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(math.prod(entry["shape"]) for entry in header.values())


def find_folder(path: str) -> Path:
    """Of a base on this disk, or in the cache of what was downloaded from the hub."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache  # takes a moment to import
    from huggingface_hub.errors import HFValidationError

    from ptune_dist.common.hub import split_revision

    try:
        name, revision = split_revision(path)
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # the path of a folder that is not there
        return Path(path)
    return Path(found).parent if isinstance(found, str) else Path(path)
