"""Tiny bases to copy, damage and load: what the tests of this folder share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptune_dist.base.load import fill_whole
from ptune_dist.base.open import OpenedBase
from ptune_dist.errors import UserError
from ptune_dist.families.find import open_any
from tests.conftest import ENCODERS, SEQ2SEQ

QUERY = "model.layers.0.self_attn.q_proj.weight"  # of a tiny Llama
IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [60, 70, 80, 90, 100, 110]])


def load(path, **options):
    return fill_whole(open_any(str(path), **{"dtype": torch.float32} | options))


def open_only(path, **options) -> OpenedBase:
    return open_any(str(path), **{"dtype": torch.float32} | options)


def error_of(call, *arguments, starts: str = "model.path: ", **options) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.startswith(starts) and "\n" not in message
    return message


def rewrite_weights(base: Path, change) -> None:
    """`change` takes the tensors by name and alters them, or returns those to store instead."""
    tensors = load_file(base / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})


def drop(name: str):
    """A change for `rewrite_weights`."""
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def rewrite_shape(base: Path, **changes: Any) -> None:
    content = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(content))


def family_of(kind: str) -> str:
    return "seq2seq" if kind in SEQ2SEQ else "encoder" if kind in ENCODERS else "causal"


def inputs_of(model) -> dict[str, torch.Tensor]:
    """What a model reads: token ids, for an encoder-decoder's decoder too."""
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(**inputs_of(model)).logits
