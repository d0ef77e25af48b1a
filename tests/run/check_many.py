"""Load several bases one after another in one process group.

usage: check_many.py SPECS.json OUT, a list of [CONFIG, [override, ...]]. Writes OUT/RANK.json: for each its error, or
what has changed of the model after the check.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ptune_dist.config.load import load_config
from ptune_dist.distributed.world import World, init_distributed
from ptune_dist.errors import UserError
from ptune_dist.run import job
from ptune_dist.run.reading import build_reading
from tests.run.strange_bases import register


def state_of(model: Any) -> dict[str, Any]:
    """What a check must leave as it was."""
    return {
        "random numbers": torch.get_rng_state().sum().item(),
        "mode": [model.training, *(prompt.training for prompt in model.prompts)],
        "passes": [model.placement, id(model.objective), getattr(model, "_windows", None)],
        "prompts": [id(prompt) for prompt in model.prompts],
        "windows": [getattr(m, "sliding_window", None) for m in model.modules()] + [str(model.base.config)],
        "vectors": list(model.num_vectors),
        "gradients": [p.grad is None for p in model.prompts.parameters()],
    }


def watched(check: Any, changed: list[str]) -> Any:
    """`check_base`, which adds to `changed` what it has changed."""

    def check_and_compare(engine: Any, *args: Any) -> None:
        before = state_of(engine.model)
        check(engine, *args)
        after = state_of(engine.model)
        changed.append(", ".join(name for name in before if before[name] != after[name]) or "nothing changed")

    return check_and_compare


def load(path: str, overrides: list[str], world: World, changed: list[str]) -> str:
    """Collective: every rank must call."""
    changed.clear()
    try:
        job.build_job(build_reading(load_config(path, overrides)), world)
    except UserError as error:
        return str(error)
    return changed[0] if changed else "not checked"


def main() -> None:
    register()
    world = init_distributed()
    changed: list[str] = []
    job.check_base = watched(job.check_base, changed)
    found = [load(path, overrides, world, changed) for path, overrides in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2], f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
