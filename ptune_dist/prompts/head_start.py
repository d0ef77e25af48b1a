"""A trained head that stands beside a stored prompt, which is trained further with it.

An encoder's classification head, or the head that answers numbers. PEFT's adapters hold the former as
`base_model.NAME`, or as `base_model.model.NAME` where the adapter is no prompt.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptune_dist.prompts.start import VALUE_HEAD, Source, Start

HEAD = "head."
OF_PEFT = ("base_model.model.", "base_model.")
NOT_OF_HEAD = ("trainable_tokens_delta", "adaption_")  # what PEFT's adapters hold under such names beside a head


@dataclass(frozen=True)
class HeadStart:
    """What the head of a run may start from; `tensors` are empty where the file has no head for the same labels.

    scale: mean and standard deviation of the numbers that a head was trained to answer. has_labels: whether the file is
    of a run with the same labels; None where it does not say.
    """

    file: Path
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scale: dict[str, float] | None = None
    has_labels: bool | None = None

    def tensors_for(self, mean: float, std: float) -> dict[str, torch.Tensor]:
        """The tensors, with those of a head that answers numbers for targets of another mean and deviation."""
        found = dict(self.tensors)
        if self.scale is not None:
            ratio = self.scale["std"] / std
            found[f"{VALUE_HEAD}weight"] = found[f"{VALUE_HEAD}weight"] * ratio
            found[f"{VALUE_HEAD}bias"] = found[f"{VALUE_HEAD}bias"] * ratio + (self.scale["mean"] - mean) / std
        return found


def read_head(start: Start, labels: list[str] | None) -> HeadStart:
    """The head in `prompt.init_file`, where it tells these labels apart. Raises UserError."""
    source = start.read()
    found = {name: tensor.float() for name, tensor in source.tensors.items() if name.startswith((HEAD, VALUE_HEAD))}
    if source.settings:
        found |= {HEAD + strip(name): tensor.float() for name, tensor in source.tensors.items() if is_of_head(name)}
    known = stored_labels(source)
    has_labels = None if known is None else known == labels
    if has_labels is False:
        found = {}
    scale = source.facts.get("target_scale") if f"{VALUE_HEAD}weight" in found else None
    return HeadStart(source.file, found, scale, has_labels)


def is_of_head(name: str) -> bool:
    """Whether a tensor of a PEFT adapter is one of a head's."""
    return name.startswith(OF_PEFT) and not any(part in name for part in NOT_OF_HEAD)


def strip(name: str) -> str:
    """The name in the base of a tensor of a PEFT adapter."""
    return next(name.removeprefix(prefix) for prefix in OF_PEFT if name.startswith(prefix))


def stored_labels(source: Source) -> list[str] | None:
    """The labels that a stored head tells apart; None where the file does not say."""
    if not source.settings:
        return source.facts.get("labels")
    try:
        shape: dict[str, Any] = json.loads((source.file.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return list(shape["id2label"].values()) if "id2label" in shape else None
