"""What nodes that train a run as replicas must have in common: all that decides the curve and the end."""

from collections.abc import Mapping
from typing import Any

from ptune_dist.nodes.run_facts import Facts, hide
from ptune_dist.run.job import Job

# What may differ between nodes: places of files, how each of them computes and reports, and when it gives up.
OF_A_NODE = (
    "output_dir",
    "deepspeed",
    "model.path",
    "model.check",
    "data.train",
    "data.validation",
    "data.cache_dir",
    "data.cache_gib",
    "prompt.init_file",
    "train.nodes",
    "train.num_blocks",  # as the three after it: the group compares what they have become
    "train.min_nodes",
    "train.max_nodes",
    "train.num_workers",
    "train.micro_batch_tokens",
    "train.log_every",
    "train.report_to",
    "train.resume",
    "train.hang_timeout_s",
    "train.stall_timeout_s",
    "train.context_cache_gib",
    "train.context_cache_gpu_gib",
    "train.context_cache_dir",
)


def build_facts(job: Job, row_digests: Mapping[str, str]) -> Facts:
    """By the keys of the config. row_digests: of the rows that are read, by a name for people."""
    found = flatten(job.config.model_dump(mode="json"))
    loss_scale = job.engine.prompts.loss_scale
    if loss_scale is not None:
        settings = ("is_dynamic", "window", "hysteresis", "refills_hysteresis", "min_scale")
        found |= {f"deepspeed: fp16: {key}": getattr(loss_scale, key) for key in settings}
    found |= {f"the data of {name}": hide(digest) for name, digest in row_digests.items()}
    return found | {"the base of model.path": hide(job.fingerprint)}


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys of a config with their values, but for those of `OF_A_NODE`. A sweep is one key."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        key = prefix + name
        if key in OF_A_NODE:
            continue
        if isinstance(value, dict) and value and key != "sweep":
            found |= flatten(value, f"{key}.")
        else:
            found[key] = value
    return found
