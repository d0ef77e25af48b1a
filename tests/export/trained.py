"""Folders of runs with a given prompt, made without training."""

from pathlib import Path
from typing import Any

import torch

from ptune_dist.base.source import fingerprint_base
from ptune_dist.commands import export_runs
from ptune_dist.config.schema import Config
from ptune_dist.export.runs import ExportRequest
from ptune_dist.prompts.store import save_prompt
from ptune_dist.run.folder import read_run_config
from ptune_dist.run.resolve import resolve
from ptune_dist.run.stored_prompt import describe_text
from tests.conftest import ENCODERS, LABELS, SEQ2SEQ, write_config

NUM_VIRTUAL = 4


def draw(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(NUM_VIRTUAL, width, generator=torch.Generator().manual_seed(seed))


def family_of(kind: str) -> str:
    return "encoder" if kind in ENCODERS else "seq2seq" if kind in SEQ2SEQ else "causal"


def write_trained(
    folder: Path,
    base: Path,
    kind: str,
    tensors: dict[str, torch.Tensor],
    method: str = "prompt_tuning",
    **sections: Any,
) -> Path:
    """A run's folder with `tensors` as its prompt; `sections` are those of its config."""
    folder.mkdir(parents=True)
    data = {"labels": LABELS, "target": "{{ label }}"} if kind in ENCODERS else {}
    sections["data"] = data | sections.get("data", {})
    sections["model"] = {"path": str(base)} | sections.get("model", {})
    sections["prompt"] = {"method": method} | sections.get("prompt", {})
    config = read_config(write_config(folder / "config.yaml", output_dir=str(folder), **sections).parent)
    facts = {
        "method": method,
        "num_virtual_tokens": NUM_VIRTUAL,
        "width": next(iter(tensors.values())).shape[-1],
        "placement": config.prompt.placement,
        "labels": LABELS if kind in ENCODERS else None,
        "text": describe_text(config.prompt),
        "longest_target": 6,
        "base": {
            "path": str(base),
            "family": family_of(kind),
            "model_type": kind,
            "fingerprint": fingerprint_base(str(base), random_init=False, seed=0),
            "num_layers": 2,
            "num_attention_heads": 4,
        },
    }
    save_prompt(folder / "prompt", tensors, facts)
    return folder


def read_config(folder: Path) -> Config:
    return read_run_config(folder, resolve=resolve)


def export(runs: list[Path], out: Path, to: str = "model", **options: Any) -> list[str]:
    return export_runs([(read_config(run), run) for run in runs], ExportRequest(to, out, **options))
