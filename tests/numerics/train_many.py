"""Train several configs one after another in one process group: a launch costs seconds, a tiny run less.

usage: train_many.py SPECS.json, a list of [CONFIG, [override, ...]]. Leaves `base_hashes.json` in every run: the digest
of each tensor of the base after it was loaded and after training.
"""

import hashlib
import json
import sys
from pathlib import Path

import deepspeed
import torch

import ptune_dist.loop
from ptune_dist.base.layers import parameter_size
from ptune_dist.config.load import load_config
from ptune_dist.run.job import Job, build_job


def hash_base(job: Job) -> dict[str, str]:
    """Digest of every frozen tensor of the base, gathered where ZeRO-3 has cut it. Collective: every rank must call."""
    hashes = {}
    for name, tensor in [*job.engine.model.base.named_parameters(), *job.engine.model.base.named_buffers()]:
        if tensor.requires_grad:  # an encoder's head
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            hashes[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + data).hexdigest()
    return hashes


def count_elements(job: Job) -> int:
    """Elements of the base's tensors, each once, also where ZeRO-3 has cut them."""
    return sum(parameter_size(parameter) for parameter in job.engine.model.base.parameters())


def main() -> None:
    seen: list[tuple[Job, dict[str, str]]] = []

    def build_and_hash(reading, world, **options) -> Job:
        job = build_job(reading, world, **options)
        seen.append((job, hash_base(job)))
        return job

    ptune_dist.loop.build_job = build_and_hash
    for path, overrides in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(path, overrides)
        seen.clear()
        ptune_dist.loop.train(config)
        ((job, before),) = seen
        after = hash_base(job)
        if job.engine.world.is_main:
            found = {"before": before, "after": after, "num_elements": count_elements(job)}
            Path(config.output_dir, "base_hashes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
