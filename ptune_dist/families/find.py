"""Which family a base belongs to."""

from typing import Any

from transformers import PretrainedConfig

from ptune_dist.base.open import OpenedBase, open_base
from ptune_dist.base.source import load_shape
from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.families.family import Family


def find_family(shape: PretrainedConfig, asked: str, path: str) -> Family:
    """The family that `model.family` asks for, or the base's own for `auto`. Raises UserError."""
    kind = shape.model_type
    own = next((family for family in FAMILIES.values() if family.is_own(shape)), None)
    found = own if asked == "auto" else FAMILIES[asked]
    if found is None or not found.knows(shape):
        known = "decoder-only language model (causal), an encoder-decoder (seq2seq) or a text encoder (encoder)"
        wanted = f"a {known}" if found is None else f"an architecture with model.family={found.name}"
        raise UserError(f"model.path: {path} is a {kind} model: {wanted} is needed")
    if own is not None and found is not own:
        raise UserError(f"model.family: {path} is a {kind} model, which is {own.name}, not {found.name}")
    return found


def open_any(path: str, family: str = "auto", **options: Any) -> OpenedBase:
    """A base of any family without its weights; options are those of `open_base`. Raises UserError."""
    return open_base(path, find_family(load_shape(path), family, path), **options)
