"""A sweep: several prompts trained together in one job over one base, each the config it would have had alone.

The schema imports this module to check the sweep of a config, so this module knows the class for its types only.
"""

import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ptune_dist.errors import UserError

Config = TypeVar("Config", bound=Any)  # that of config.schema, which imports this module

ONLY_MEMBER = "prompt"  # the name of the one member where there is no sweep
MAX_NAME_LENGTH = 80
# What members may differ in, beside the options of a prompt's method. The base, the placement, the batch size and the
# length of training are the same for the whole job.
SWEEPABLE = (
    "seed",
    "train.learning_rate",
    "train.weight_decay",
    "train.schedule",
    "train.warmup_steps",
    "train.warmup_type",
    "train.min_lr_ratio",
    "train.max_grad_norm",
    "train.betas",
    "train.eps",
    "train.momentum",
    "train.optimizer",
    "prompt.method",
    "prompt.num_virtual_tokens",
    "prompt.init",
    "prompt.init_text",
    "prompt.init_labels",
    "prompt.init_file",
    "prompt.text",
    "data.train",
    "data.validation",
    "data.template",
    "data.target",
    "data.references",
    "data.labels",
    "data.task",
    "data.tasks",
    "data.max_length",
    "data.truncation_side",
    "data.append_eos",
)
# Keys that are like train.eps and prompt.text.
NO_MISSPELLINGS = (
    "train.epochs",
    "train.nodes",
    "train.outer_momentum",
    "prompt.text.task",
    "prompt.text.input",
    "prompt.text.output",
)
PROMPT_KEY = re.compile(r"prompt\.(?!placement$)\w+")  # the schema has not all of them: a method has its own options
PATH_KEYS = ("data.train", "data.validation", "prompt.init_file")
# Without these outside the sweep a config can be incomplete although every member of it is complete.
FILLED_KEYS = (
    "data.train",
    "data.validation",
    "data.template",
    "data.target",
    "data.labels",
    "prompt.method",
    "prompt.init_text",
    "prompt.init_labels",
    "prompt.init_file",
    "prompt.text",
)
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # 1e-3, which YAML reads as text


def expand_sweep(config: Config, resolve: Callable[[Config], Config] | None = None) -> dict[str, Config]:
    """Each member's name and the config that it would have alone, in the order of the sweep.

    config: as load_config returns it, its members checked. Without a sweep it is its own only member, ONLY_MEMBER. A
    member's output_dir is OUTPUT_DIR/members/NAME.
    resolve: as for load_config; without it a member's prompt has only the options that the config gives.
    """
    if not config.sweep:
        return {ONLY_MEMBER: config}
    members = {name: validate_member(config, name, raw) for name, raw in render_members(config).items()}
    return {name: resolve(member) for name, member in members.items()} if resolve else members


def member_config(config: Config, name: str, resolve: Callable[[Config], Config] | None = None) -> Config:
    """The config of one member. Raises UserError where there is none of that name."""
    members = expand_sweep(config, resolve)
    if name not in members:
        raise UserError(f"--member: {name} is none of {', '.join(members)}")
    return members[name]


@contextmanager
def naming_member(members: dict[str, Any], name: str, *sections: str) -> Iterator[None]:
    """Have a member's UserError begin with its name, where members differ in these sections of the config."""
    try:
        yield
    except UserError as error:
        own, *others = ({key: one.model_dump()[key] for key in sections} for one in members.values())
        if any(other != own for other in others):
            raise UserError(f"sweep: {name}: {error}") from None
        raise


def render_members(config: Any) -> dict[str, dict[str, Any]]:
    """Each member's name and its config as plain dicts, not yet validated; empty without a sweep."""
    members = {}
    for name, values in name_members(list_members(config.sweep)).items():
        output_dir = os.path.join(config.output_dir, "members", name)
        raw = config.model_dump() | {"output_dir": output_dir, "sweep": None, "sweep_halving": None}
        for key, value in values.items():
            section, _, leaf = key.rpartition(".")
            (raw[section] if section else raw)[leaf] = value
        members[name] = raw
    return members


def validate_member(config: Config, name: str, raw: dict[str, Any]) -> Config:
    """One of `render_members` as a config. Raises ValidationError.

    Where members have methods of their own, the number of virtual tokens outside the sweep is for those that take some.
    """
    member = type(config).model_validate(raw)
    own = name_members(list_members(config.sweep))[name]
    if "prompt.method" in own and "prompt.num_virtual_tokens" not in own:
        member.prompt.model_fields_set.discard("num_virtual_tokens")
    return member


def list_members(sweep: dict[str, list] | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The values that each member has of its own, by dotted key; of a mapping's, the last key changes fastest."""
    if isinstance(sweep, dict):
        return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    return list(sweep or [])


def sweep_keys(sweep: dict[str, list] | list[dict[str, Any]] | None) -> set[str]:
    """The dotted keys that members differ in."""
    return {key for member in list_members(sweep) for key in member}


def name_members(members: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Members by names that are safe as names of folders: `learning_rate=0.1,seed=0`.

    Names are cut to MAX_NAME_LENGTH; those taken already, in upper or lower case, end in -2, -3, ...
    """
    named: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    for values in members:
        # The last part of a key is enough: no two sweepable keys of the schema end alike.
        parts = [f"{key.rpartition('.')[2]}={render_value(key, value)}" for key, value in values.items()]
        full_name = re.sub(r"[^A-Za-z0-9_.=,+-]", "-", ",".join(parts))
        name = full_name[:MAX_NAME_LENGTH]
        for number in itertools.count(2):
            if name.lower() not in taken:
                break
            name = f"{full_name[: MAX_NAME_LENGTH - len(str(number)) - 1]}-{number}"
        taken.add(name.lower())
        named[name] = values
    return named


def render_value(key: str, value: Any) -> str:
    """A value as part of a name: a path's last part without its suffix, the items of a list or mapping joined by +."""
    if isinstance(value, dict):  # prompt.text
        value = [part for part in value.values() if part]
    if isinstance(value, (list, tuple)):
        return "+".join(render_value(key, item) for item in value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if key in PATH_KEYS:
        return re.sub(r"\.[A-Za-z]+$", "", Path(str(value)).name)  # v1.5 has no suffix
    return str(value)


def check_sweep(sweep: Any) -> dict[str, list] | list[dict[str, Any]]:
    """The sweep as read from YAML, with 1e-3 as a number. Raises ValueError, naming sweep.KEY, if it is malformed."""
    if isinstance(sweep, dict) and sweep:
        for key, values in sweep.items():
            check_key(key, values)
            if not isinstance(values, list):
                raise ValueError(f"sweep.{key}: a list of values is needed, got {values!r}")
            if not values:
                raise ValueError(f"sweep.{key}: the list of values is empty")
        return {key: [read_number(key, value) for value in values] for key, values in sweep.items()}
    if isinstance(sweep, list) and sweep:
        for number, member in enumerate(sweep, 1):
            if not isinstance(member, dict) or not member:
                raise ValueError(f"sweep: member {number}: a mapping of keys to values is needed, got {member!r}")
            for key, value in member.items():
                check_key(key, value)
        return [{key: read_number(key, value) for key, value in member.items()} for member in sweep]
    raise ValueError(f"sweep: a mapping of keys to lists, or a list of mappings, is needed, got {sweep!r}")


def check_key(key: Any, value: Any) -> None:
    """Raise ValueError, with the sweepable key most like it, unless members may differ in this key."""
    if key in SWEEPABLE or PROMPT_KEY.fullmatch(str(key)):
        return
    if isinstance(value, dict):
        raise ValueError(f"sweep.{key}: the keys of a sweep are dotted, such as train.learning_rate")
    compared = {known if "." in str(key) else known.rpartition(".")[2]: known for known in SWEEPABLE}
    # A high cutoff: train.max_steps is no misspelled warmup_steps.
    near = [] if key in NO_MISSPELLINGS else difflib.get_close_matches(str(key), compared, n=1, cutoff=0.8)
    hint = f", did you mean {compared[near[0]]}?" if near else ""
    raise ValueError(f"sweep.{key}: not a key that members can differ in{hint}")


def read_number(key: str, value: Any) -> Any:
    """The value, where YAML read a number such as 1e-3 as text: the number."""
    is_number = key.startswith("train.") and isinstance(value, str) and _EXPONENT.fullmatch(value)
    return float(value) if is_number else value


def fill_from_members(raw: Any) -> Any:
    """A config as read from YAML, with what every member gives and the config lacks taken from the first member.

    So a sweep over tasks need not name a data.train twice. A malformed value is returned unchanged.
    """
    if not isinstance(raw, dict):
        return raw
    try:
        members = list_members(check_sweep(raw.get("sweep")))
    except ValueError:  # reported where the key itself is checked
        return raw
    filled = dict(raw)
    for key in FILLED_KEYS:
        section, _, leaf = key.partition(".")
        # Where a member gives prompt.init too, init_text and the like belong to that, not to the prompt.init outside.
        is_needed = not key.startswith("prompt.init_") or all("prompt.init" not in member for member in members)
        if is_needed and all(key in member for member in members) and isinstance(filled.get(section, {}), dict):
            filled[section] = {leaf: members[0][key]} | filled.get(section, {})
    return filled


def map_paths(sweep: Any, resolve: Callable[[Any], Any]) -> Any:
    """The sweep with its paths resolved."""
    if isinstance(sweep, dict):
        return {key: [resolve(v) for v in values] if key in PATH_KEYS else values for key, values in sweep.items()}
    if sweep:
        return [{key: resolve(v) if key in PATH_KEYS else v for key, v in member.items()} for member in sweep]
    return None
