"""Weight files of a base with more tokens: only the files that hold its embeddings and its head are written anew.

Shapes: V tokens of the base, N tokens of the exported model, D width.
"""

import copy
import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from ptune_dist.base.names import renamed, spellings
from ptune_dist.base.open import OpenedBase
from ptune_dist.base.other_folders import INDEX
from ptune_dist.base.source import is_local_only
from ptune_dist.base.weight_files import WeightFiles, find_weight_files, open_weight_files
from ptune_dist.common.files import share_as_folder
from ptune_dist.errors import UserError

ROUND_TO = 64  # GPUs multiply by heads of such sizes fastest; kept where the base keeps to it
FINAL_BIAS = "final_logits_bias"


@dataclass(frozen=True)
class Changes:
    """Tensors [N, ...] that replace stored ones, and those that the base's files do not have, by their stored names."""

    replaced: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor]
    num_tokens: int
    architecture: str  # the class of the model
    has_untied: bool
    is_rounded: bool


def count_tokens(num_stored: int, ids: Sequence[int]) -> int:
    """How many tokens a model needs that has these ids beside its own."""
    needed = max(num_stored, max(ids) + 1)
    if num_stored % ROUND_TO == 0:
        needed += -needed % ROUND_TO
    return needed


def change_tokens(
    opened: OpenedBase, path: str, rows: dict[int, torch.Tensor], appended: set[int], unused: int | None
) -> Changes:
    """The tensors of a base in which some tokens have the input vectors `rows` [D] by id. Raises UserError.

    Rows of the head are the base's, and those of `appended` tokens copy token `unused`'s, which is never answered.
    Without one they are the mean of all rows: the mean of all logits is never the largest one.
    """
    stored = open_weight_files(path, local_only=is_local_only(path))
    model = opened.model
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    head = model.get_output_embeddings()
    names = stored_names(opened, stored, embeddings.weight)
    if not names:
        raise UserError(f"--to model: the files of {path} hold its embeddings under a name that is not known here")
    old = read_whole(stored, names[0], path)
    num_tokens = count_tokens(len(old), list(rows))
    scale = find_scale(opened, path)
    vectors = torch.stack(list(rows.values())).float() / scale
    grown = extend(old, num_tokens, mean_row(old))
    grown[list(rows)] = vectors.to(old.dtype)
    is_rounded = not torch.equal(grown[list(rows)].float(), vectors)
    replaced = dict.fromkeys(names, grown)
    new: dict[str, torch.Tensor] = {}
    is_tied = head is not None and head.weight is embeddings.weight
    if head is not None:
        of_head = change_head(opened, stored, path, old if is_tied else None, num_tokens, appended, unused)
        own = parameter_name(opened, head.weight, last=True)
        if is_tied and all(name in spellings(model, own) for name in names):  # stored as the head alone
            new[parameter_name(opened, embeddings.weight)] = grown
        replaced |= {name: tensor for name, tensor in of_head.items() if name in stored.shapes}
        new |= {name: tensor for name, tensor in of_head.items() if name not in stored.shapes}
    refuse_other_tables(opened, len(old), path)
    return Changes(replaced, new, num_tokens, type(model).__name__, is_tied, is_rounded)


def change_head(
    opened: OpenedBase,
    stored: WeightFiles,
    path: str,
    tied_to: torch.Tensor | None,
    num_tokens: int,
    appended: set[int],
    unused: int | None,
) -> dict[str, torch.Tensor]:
    """The head's tensors [N, ...]. `tied_to`: the embeddings [V, D] that it shares; it gets weights of its own."""
    head = cast(Any, opened.model.get_output_embeddings())
    found = {}
    for parameter in (head.weight, getattr(head, "bias", None)):
        if parameter is None:
            continue
        names = stored_names(opened, stored, parameter)
        if parameter is head.weight and tied_to is not None:
            own = parameter_name(opened, parameter, last=True)
            names = [name for name in names if name in spellings(opened.model, own)] or [own]
            old = tied_to
        elif names:
            old = read_whole(stored, names[0], path)
        else:
            raise UserError(f"--to model: the files of {path} hold its head under a name that is not known here")
        row = mean_row(old) if unused is None else old[unused]
        grown = extend(old, num_tokens, row)
        within = sorted(i for i in appended if i < len(old))  # rows that no token of the base has
        grown[within] = row.to(old.dtype)
        found |= dict.fromkeys(names, grown)
    for name in stored.shapes:
        if name.endswith(FINAL_BIAS):
            found[name] = extend(read_whole(stored, name, path)[0], num_tokens, torch.tensor(0.0))[None]
    return found


def extend(old: torch.Tensor, num_tokens: int, row: torch.Tensor) -> torch.Tensor:
    """[N, ...] of [V, ...]: the rest is filled with one row."""
    grown = old.new_empty(num_tokens, *old.shape[1:])
    grown[: len(old)] = old
    grown[len(old) :] = row.to(old.dtype)
    return grown


def mean_row(rows: torch.Tensor) -> torch.Tensor:
    return rows.float().mean(0)


def read_whole(stored: WeightFiles, name: str, path: str) -> torch.Tensor:
    """Raises UserError for a tensor that is stored quantized."""
    if not stored.holds_floats(name) or stored.dtype_of(name).itemsize < 2:
        raise UserError(f"--to model: {path} stores {name} quantized, and a token's vector must be exact")
    return stored.read_rows(name, 0, stored.shapes[name][0])


def stored_names(opened: OpenedBase, stored: WeightFiles, parameter: torch.Tensor) -> list[str]:
    """The names in a base's files of a parameter, which may be stored once for each of its names in the model."""
    model = opened.model
    own = [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
    found = [each for name in own for each in spellings(model, name) if each in stored.shapes]
    if not found:  # of older releases
        found = [each for each in stored.shapes if set(spellings(model, renamed(model, each))) & set(own)]
    if not found:  # a language model that is part of another, say
        ends = tuple("." + ".".join(name.split(".")[-2:]) for name in own)
        shape = tuple(parameter.shape)
        found = [name for name in stored.shapes if name.endswith(ends) and stored.shapes[name] == shape]
        found = found if len(found) == 1 else []
    return list(dict.fromkeys(found))


def parameter_name(opened: OpenedBase, parameter: torch.Tensor, *, last: bool = False) -> str:
    """The first or the last of a parameter's names in the model: heads come after embeddings."""
    own = [name for name, other in opened.model.named_parameters(remove_duplicate=False) if other is parameter]
    return own[-1 if last else 0]


def find_scale(opened: OpenedBase, path: str) -> float:
    """What an embedding is multiplied with when it is looked up, as in Gemma. Raises UserError for anything else."""
    tokens = cast(nn.Embedding, opened.model.get_input_embeddings())
    few = cast(Any, copy.copy(tokens))
    few.num_embeddings = 1
    few.padding_idx = None
    probe = torch.tensor([1.0, 2.0, -4.0, 0.5], dtype=opened.dtype).repeat(tokens.embedding_dim // 4 + 1)
    probe = probe[None, : tokens.embedding_dim]
    ratio = torch.zeros_like(probe)
    if len(list(tokens.named_parameters())) == 1:
        with torch.no_grad():
            ratio = functional_call(few, {"weight": probe}, (torch.tensor([0]),)) / probe
    if not ratio.any() or not torch.equal(ratio, ratio[:, :1].expand_as(ratio)):
        raise UserError(
            f"--to model: {path} changes what it looks up of a token, so no token can have a trained vector"
        )
    return float(ratio[0, 0])


def refuse_other_tables(opened: OpenedBase, num_stored: int, path: str) -> None:
    """Raise UserError for a base that looks tokens up in more tables than one, as Gemma 3n."""
    tokens = cast(nn.Embedding, opened.model.get_input_embeddings()).weight
    head = opened.model.get_output_embeddings()
    for name, module in opened.model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module.weight is not tokens and module is not head
        if is_table and len(cast(nn.Embedding, module).weight) == num_stored:
            raise UserError(f"--to model: {path} has another table of its tokens, {name}: use --to prompt-embeds")


def write_weights(path: str, changes: Changes, out: Path) -> list[Path]:
    """Write the changed files to `out` and hard-link the others; returns those that were linked.

    Where links cannot be made, as on another disk, files are copied.
    """
    files = find_weight_files(path, is_local_only(path))
    new = dict(changes.new)
    linked = []
    places: dict[str, str] = {}
    total = 0
    for file in sorted(files, key=lambda file: file.name):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            metadata = opened.metadata() or {"format": "pt"}
            own = {name: changes.replaced[name] for name in names if name in changes.replaced}
            if own:
                tensors = {name: own[name] if name in own else opened.get_tensor(name) for name in names} | new
                new = {}
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / file.name, metadata)
                share_as_folder(out / file.name)
                names = list(tensors)
        if not own:
            link_or_copy(file, out / file.name)
            linked.append(out / file.name)
        places |= dict.fromkeys(names, file.name)
        total += count_bytes(out / file.name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return linked


def count_bytes(file: Path) -> int:
    """The bytes of a safetensors file's tensors."""
    with file.open("rb") as opened:
        (header,) = struct.unpack("<Q", opened.read(8))
    return file.stat().st_size - 8 - header


def link_or_copy(file: Path, target: Path) -> None:
    """Hard-link a file, or the one that a symbolic link leads to; copy it where the disk or its owner forbid that."""
    source = file.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
