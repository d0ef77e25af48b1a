"""The trained prompt as files: `prompt.safetensors`, whole by itself, and `prompt.json`, the same facts for people."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ptune_dist.common.files import explain_unreadable, make_folder, replace_file
from ptune_dist.errors import UserError


def save_prompt(folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write a prompt folder; the facts travel in the tensor file's header too, so that the two cannot part."""
    make_folder(folder)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}  # as safetensors wants them
    replace_file(folder / "prompt.safetensors", save(stored, metadata={"facts": json.dumps(facts)}))
    replace_file(folder / "prompt.json", (json.dumps(facts, indent=2) + "\n").encode())


def load_prompt(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts of a prompt folder. Raises UserError."""
    file = folder / "prompt.safetensors"
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            facts = json.loads((opened.metadata() or {})["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        is_absent = isinstance(error, FileNotFoundError) and not os.path.lexists(file)
        reason = "no such file: has the run trained?" if is_absent else explain_unreadable(file) or error
        raise UserError(f"{file}: cannot read the prompt: {reason}") from None
    return tensors, facts
