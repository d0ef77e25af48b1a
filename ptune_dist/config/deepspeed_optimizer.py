"""Sections `optimizer` and `scheduler` of DeepSpeed's JSON: each option is the config's own value or is refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptune_dist.config.schema import Config, TrainConfig
from ptune_dist.errors import UserError

Settle = Callable[..., None]  # deepspeed_json.Settler

# DeepSpeed's names for the values of train.optimizer and train.schedule.
OPTIMIZER_TYPES = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd", "adafactor": "adafactor"}
SCHEDULER_TYPES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# How a step is computed, which changes no number of it.
HOW = set("torch_adam fused foreach capturable differentiable set_grad_none".split())
# Options with the one value that they have here.
FIXED_IN_OPTIMIZER = {
    "adamw": {"bias_correction": True, "correct_bias": True, "amsgrad": False, "maximize": False},
    "sgd": {"dampening": 0, "nesterov": False, "maximize": False},
    "adafactor": {
        "beta2_decay": -0.8, "d": 1.0, "decay_rate": -0.8, "clip_threshold": 1.0, "beta1": None, "maximize": False,
        "scale_parameter": True, "relative_step": False, "warmup_init": False,
    },
}  # fmt: skip
FIXED_IN_SCHEDULER = {"warmup_min_lr": 0, "warmup_min_ratio": 0, "last_batch_iteration": -1}
# The options that each scheduler takes.
OF_WARMUP = ("warmup_num_steps", "warmup_type", "last_batch_iteration")
SCHEDULER_OPTIONS = {
    "WarmupLR": (*OF_WARMUP, "warmup_min_lr", "warmup_max_lr"),
    "WarmupDecayLR": (*OF_WARMUP, "warmup_min_lr", "warmup_max_lr", "total_num_steps"),
    "WarmupCosineLR": (*OF_WARMUP, "warmup_min_ratio", "cos_min_ratio", "total_num_steps"),
}
# The learning rate and the weight decay of an optimizer that is given none.
LEFT_OUT = {"adamw": (1e-3, 0.0), "sgd": (1e-3, 0.0), "adafactor": (1e-2, 0.0)}
WEIGHT_DECAY_OF_TORCH = 1e-2  # torch.optim.AdamW's own, under "torch_adam"


@dataclass(frozen=True)
class Ours:
    """An option of DeepSpeed's that the config has too."""

    key: str  # below train
    value: Any
    left_out: Any = None  # what DeepSpeed takes where the option is left out; None where that is an error, or ours


def settle_optimizer(settle: Settle, content: dict[str, Any], file: str, config: Config) -> None:
    """An `optimizer` section must name what train.optimizer names, with the same numbers. Raises UserError."""
    section = content.get("optimizer")
    train = config.train
    if section is None:
        return
    kind = name_type(section, "optimizer", file)
    if kind.lower() not in OPTIMIZER_TYPES:
        raise UserError(
            f"{file}: optimizer.type is {kind!r}, which is no value of train.optimizer: "
            f"it may be {', '.join(FIXED_IN_OPTIMIZER)}, and here it is {train.optimizer}"
        )
    meant = OPTIMIZER_TYPES[kind.lower()]
    if meant != train.optimizer:
        raise UserError(
            f"{file}: optimizer.type is {kind!r} but train.optimizer is {train.optimizer!r}: set "
            f"train.optimizer={meant}, or remove the section"
        )
    refuse_others(section, ("type", "params", "legacy_fusion"), f"{file}: optimizer")
    params = section.setdefault("params", {})
    place = f"{file}: optimizer.params"
    # DeepSpeed reads adam_w_mode for "Adam" only.
    is_decoupled = kind.lower() != "adam" or params.get("adam_w_mode", True) is not False
    ours = optimizer_values(train, is_torch_adamw=is_decoupled and bool(params.get("torch_adam")))
    fixed = FIXED_IN_OPTIMIZER[train.optimizer]
    refuse_others(params, {*ours, *fixed, *HOW, "adam_w_mode", "fp32_optimizer_states"}, place)
    settle_values(settle, params, ours, file, "optimizer.params")
    refuse_different(params, {**fixed, "fp32_optimizer_states": True}, place)
    if not is_decoupled and train.weight_decay:
        raise UserError(
            f"{place}.adam_w_mode is false but train.weight_decay is decoupled, as AdamW has it: "
            "remove it, or set train.weight_decay=0"
        )
    drop_autos(params)


def name_type(section: dict[str, Any], name: str, file: str) -> str:
    """The type of an optimizer or a scheduler. Raises UserError where the section has none."""
    kind = section.get("type")
    if not isinstance(kind, str) or not kind:
        key = {"optimizer": "train.optimizer", "scheduler": "train.schedule"}[name]
        raise UserError(f"{file}: {name} has no type: give {name}.type, or remove the section: {key} names it already")
    return kind


def optimizer_values(train: TrainConfig, *, is_torch_adamw: bool) -> dict[str, Ours]:
    """The parameters that the config has too, by DeepSpeed's names."""
    rate, decay = LEFT_OUT[train.optimizer]
    values = {
        "lr": Ours("learning_rate", train.learning_rate, rate),
        "weight_decay": Ours("weight_decay", train.weight_decay, WEIGHT_DECAY_OF_TORCH if is_torch_adamw else decay),
        "max_grad_norm": Ours("max_grad_norm", train.max_grad_norm),
    }
    if train.optimizer == "adamw":
        values |= {"betas": Ours("betas", train.betas, (0.9, 0.999)), "eps": Ours("eps", train.eps, 1e-8)}
    if train.optimizer == "sgd":
        values |= {"momentum": Ours("momentum", train.momentum, 0.0)}
    return values


def settle_scheduler(settle: Settle, content: dict[str, Any], file: str, config: Config) -> None:
    """A `scheduler` section must name what train.schedule names, with the same steps. Raises UserError."""
    section = content.get("scheduler")
    train = config.train
    if section is None:
        return
    kind = name_type(section, "scheduler", file)
    if kind not in SCHEDULER_TYPES and kind.lower() not in SCHEDULER_TYPES.values():
        raise UserError(
            f"{file}: scheduler.type is {kind!r}, which is no value of train.schedule: "
            f"it may be {', '.join(SCHEDULER_TYPES)}, and train.schedule is {train.schedule}"
        )
    if SCHEDULER_TYPES.get(kind) != train.schedule:
        name = next(theirs for theirs, ours in SCHEDULER_TYPES.items() if ours == train.schedule)
        meant = SCHEDULER_TYPES.get(kind, kind.lower())
        other = "" if meant == train.schedule else f"train.schedule={meant}, or "
        raise UserError(
            f"{file}: scheduler.type is {kind!r} but train.schedule is {train.schedule!r}, which DeepSpeed calls "
            f"{name}: set {other}the type to {name!r}, or remove the section"
        )
    refuse_others(section, ("type", "params"), f"{file}: scheduler")
    params = section.setdefault("params", {})
    options = SCHEDULER_OPTIONS[kind]
    refuse_others(params, options, f"{file}: scheduler.params")
    ours = scheduler_values(train, kind)
    if not train.warmup_steps and "warmup_num_steps" in params:  # nothing rises
        del ours["warmup_type"]
    if params.get("warmup_max_lr", "") is None:  # the optimizer's learning rate
        del params["warmup_max_lr"]
        ours["warmup_max_lr"] = Ours("learning_rate", train.learning_rate)
    if params.get("warmup_num_steps") == 1:
        raise UserError(f'{file}: scheduler.params.warmup_num_steps is 1, and DeepSpeed takes 2: set it to 2 or "auto"')
    settle_values(settle, params, {name: ours[name] for name in ours if name in options}, file, "scheduler.params")
    refuse_different(params, FIXED_IN_SCHEDULER, f"{file}: scheduler.params")
    drop_autos(params)


def scheduler_values(train: TrainConfig, kind: str) -> dict[str, Ours]:
    """The parameters that the config has too, by DeepSpeed's names."""
    return {
        "warmup_num_steps": Ours("warmup_steps", train.warmup_steps, 1000),
        "warmup_type": Ours("warmup_type", train.warmup_type, "log"),
        "warmup_max_lr": Ours("learning_rate", train.learning_rate, 1e-3 if kind == "WarmupDecayLR" else None),
        "total_num_steps": Ours("max_steps", train.max_steps),
        "cos_min_ratio": Ours("min_lr_ratio", train.min_lr_ratio, 1e-4),
    }


def settle_values(settle: Settle, params: dict[str, Any], ours: dict[str, Ours], file: str, section: str) -> None:
    """Raise UserError unless each option is the config's, `auto`, or left out where DeepSpeed's default is equal."""
    for name, own in ours.items():
        if name in params:
            settle(f"{section}.{name}", own.value, f"train.{own.key}")
    for name, own in ours.items():
        if name not in params and own.left_out not in (None, own.value):
            raise UserError(
                f"{file}: {section}.{name} is left out, which is {json.dumps(own.left_out)} to DeepSpeed, but "
                f'train.{own.key} is {json.dumps(own.value)}: make them equal or set {section}.{name} to "auto"'
            )


def refuse_others(section: dict[str, Any], known: Any, place: str) -> None:
    """Raise UserError for an option that means nothing here."""
    for name in section:
        if name not in known:
            raise UserError(f"{place}.{name} is not an option here: remove it (it may be {', '.join(sorted(known))})")


def refuse_different(params: dict[str, Any], fixed: dict[str, Any], place: str) -> None:
    """Raise UserError for an option with another value than the one that it has here."""
    for name, value in fixed.items():
        found = params.get(name, "auto")
        if found != "auto" and found != value:
            shown = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
            raise UserError(f'{place}.{name} is {found!r}, and it is {shown} here: make it so, or set it to "auto"')


def drop_autos(params: dict[str, Any]) -> None:
    """What is left as `auto` has its one value."""
    for name in [name for name, value in params.items() if value == "auto"]:
        del params[name]
