"""Match the stored tensors to the parameters of a model, and describe where they do not fit."""

import re
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ptune_dist.base.architecture import Architecture
from ptune_dist.errors import UserError

NUM_NAMED = 5
# Buffers that are computed instead of loaded; older files contain them.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$|\.token_type_ids$|masked_bias$")

Shapes = dict[str, tuple[int, ...]]


def match_names(
    model: PreTrainedModel, stored: Shapes, family: Architecture, path: str
) -> tuple[dict[str, str], list[str]]:
    """Model name -> stored name, and the parameters that start anew (a new head's). Raises UserError."""
    wanted, aliases = wanted_tensors(model)
    names: dict[str, str] = {}
    for name in wanted:
        found = next((s for alias in aliases[name] for s in spellings(model, alias) if s in stored), None)
        if found is not None:
            names |= dict.fromkeys(aliases[name], found)
    missing = [name for name in wanted if name not in names]
    wrong = [name for name in names if name in wanted and stored[names[name]] != wanted[name]]
    # Another head than the one asked for is no part of the base.
    new = [name for name in missing + wrong if family.may_start_anew(model, name)]
    wrong = [name for name in wrong if name not in new]
    used = {s for name in names for alias in aliases.get(name, [name]) for s in spellings(model, alias)}
    problems = {
        "missing": [name for name in missing if name not in new and not is_ignored(model, name, "missing")],
        "extra": [s for s in stored if s not in used and not is_harmless(model, s, family)],
        "mis-shaped": [f"{n} {list(stored[names[n]])} for {list(wanted[n])}" for n in wrong],
    }
    if any(problems.values()):
        raise UserError(f"model.path: the weights of {path} do not fit its config.json: {describe(problems)}")
    return names, new


def wanted_tensors(model: PreTrainedModel) -> tuple[Shapes, dict[str, list[str]]]:
    """Shapes of a model's parameters and stored buffers, and all names of each; tied parameters have several."""
    wanted: Shapes = {}
    aliases: dict[str, list[str]] = {}
    first_of: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        first = first_of.setdefault(id(tensor), name)
        wanted.setdefault(first, tuple(tensor.shape))
        aliases.setdefault(first, []).append(name)
    buffers = dict(model.named_buffers())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in first_of and name in buffers:
            wanted[name] = tuple(tensor.shape)
            aliases[name] = [name]
    return wanted, aliases


def spellings(model: PreTrainedModel, name: str) -> list[str]:
    """A tensor's name, and its name in a file of the model without or with the head."""
    prefix = f"{model.base_model_prefix}."
    return [name, name.removeprefix(prefix) if name.startswith(prefix) else prefix + name]


def renamed(model: PreTrainedModel, stored: str) -> str:
    """What transformers calls a stored tensor, whose architecture may have had other names."""
    for transform in get_model_conversion_mapping(model):
        stored, _ = transform.rename_source_key(stored)
    return stored


def is_ignored(model: PreTrainedModel, name: str, kind: str) -> bool:
    """Whether transformers ignores a tensor that is `kind`: missing or unexpected."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}") or []
    return any(re.search(pattern, name) for pattern in patterns)


def is_harmless(model: PreTrainedModel, stored: str, family: Architecture) -> bool:
    """Whether the model can do without a stored tensor: it computes it, or its family does not need it."""
    if COMPUTED.search(stored) or is_ignored(model, stored, "unexpected"):
        return True
    return family.may_be_left_out(model, stored)


def describe(problems: dict[str, list[str]]) -> str:
    """`2 missing tensors: a, b; 7 extra tensors: c, d, e, f, g, ...`."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = ", ..." if len(names) > NUM_NAMED else ""
            parts.append(f"{len(names)} {kind} tensors: {', '.join(names[:NUM_NAMED])}{more}")
    return "; ".join(parts)


def needs_converting(model: PreTrainedModel, stored: Iterable[str]) -> bool:
    """Whether transformers merges, permutes or renames any stored tensor when it loads this architecture."""
    wanted = set(model.state_dict(keep_vars=True))
    for transform in get_model_conversion_mapping(model):
        only_renames = not hasattr(transform, "operations")
        for name in stored:
            _, matched = transform.rename_source_key(name)
            if matched is not None and not (only_renames and wanted.intersection(spellings(model, name))):
                return True
    return False
