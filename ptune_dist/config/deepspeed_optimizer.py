"""Sections `optimizer` and `scheduler` of DeepSpeed's JSON: each option is the config's own value or is refused."""

from collections.abc import Callable
from typing import Any

from ptune_dist.config.schema import Config, TrainConfig
from ptune_dist.errors import UserError

Settle = Callable[..., None]  # deepspeed_json.Settler

# DeepSpeed's names for the values of train.optimizer and train.schedule.
OPTIMIZER_TYPES = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd", "adafactor": "adafactor"}
SCHEDULER_TYPES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# How a step is computed, which changes no number of it.
HOW = set("torch_adam fused foreach capturable differentiable set_grad_none fp32_optimizer_states".split())
# Options with the one value that they have here.
FIXED_IN_OPTIMIZER = {
    "adamw": {"bias_correction": True, "correct_bias": True, "amsgrad": False, "maximize": False},
    "sgd": {"dampening": 0, "nesterov": False, "maximize": False},
    "adafactor": {
        "beta2_decay": -0.8, "d": 1.0, "decay_rate": -0.8, "clip_threshold": 1.0, "beta1": None, "maximize": False,
        "scale_parameter": True, "relative_step": False, "warmup_init": False,
    },
}  # fmt: skip
FIXED_IN_SCHEDULER = {"warmup_min_lr": 0, "warmup_min_ratio": 0, "cos_min_ratio": 0, "last_batch_iteration": -1}


def settle_optimizer(settle: Settle, content: dict[str, Any], file: str, config: Config) -> None:
    """An `optimizer` section must name what train.optimizer names, with the same numbers. Raises UserError."""
    section = content.get("optimizer")
    train = config.train
    if section is None:
        return
    kind = str(section.get("type", ""))
    if OPTIMIZER_TYPES.get(kind.lower()) != train.optimizer:
        raise UserError(f"{file}: optimizer.type is {kind!r} but train.optimizer is {train.optimizer!r}")
    refuse_others(section, ("type", "params", "legacy_fusion"), f"{file}: optimizer")
    params = section.get("params", {})
    ours = optimizer_values(train)
    fixed = FIXED_IN_OPTIMIZER[train.optimizer]
    refuse_others(params, {*ours, *fixed, *HOW, "adam_w_mode"}, f"{file}: optimizer.params")
    for name, (key, value) in ours.items():
        if name in params:
            settle(f"optimizer.params.{name}", value, f"train.{key}")
    refuse_different(params, fixed, f"{file}: optimizer.params")
    if params.get("adam_w_mode") is False and train.weight_decay:
        raise UserError(
            f"{file}: optimizer.params.adam_w_mode is false but train.weight_decay is decoupled, as AdamW has it: "
            "remove it, or set train.weight_decay=0"
        )
    drop_autos(params)


def optimizer_values(train: TrainConfig) -> dict[str, tuple[str, Any]]:
    """The parameters that the config has too: our key and its value by DeepSpeed's name."""
    values: dict[str, tuple[str, Any]] = {
        "lr": ("learning_rate", train.learning_rate),
        "weight_decay": ("weight_decay", train.weight_decay),
        "max_grad_norm": ("max_grad_norm", train.max_grad_norm),
    }
    if train.optimizer == "adamw":
        values |= {"betas": ("betas", train.betas), "eps": ("eps", train.eps)}
    if train.optimizer == "sgd":
        values |= {"momentum": ("momentum", train.momentum)}
    return values


def settle_scheduler(settle: Settle, content: dict[str, Any], file: str, config: Config) -> None:
    """A `scheduler` section must name what train.schedule names, with the same steps. Raises UserError."""
    section = content.get("scheduler")
    train = config.train
    if section is None:
        return
    kind = str(section.get("type", ""))
    if SCHEDULER_TYPES.get(kind) != train.schedule:
        name = next(theirs for theirs, ours in SCHEDULER_TYPES.items() if ours == train.schedule)
        raise UserError(
            f"{file}: scheduler.type is {kind!r} but train.schedule is {train.schedule!r}, which DeepSpeed calls {name}"
        )
    refuse_others(section, ("type", "params"), f"{file}: scheduler")
    params = section.get("params", {})
    ours = {
        "warmup_num_steps": ("warmup_steps", train.warmup_steps),
        "total_num_steps": ("max_steps", train.max_steps),
        "warmup_max_lr": ("learning_rate", train.learning_rate),
    }
    refuse_others(params, {*ours, *FIXED_IN_SCHEDULER, "warmup_type"}, f"{file}: scheduler.params")
    for name, (key, value) in ours.items():
        if name in params:
            settle(f"scheduler.params.{name}", value, f"train.{key}")
    refuse_different(params, FIXED_IN_SCHEDULER, f"{file}: scheduler.params")
    if train.warmup_steps:
        refuse_different(params, {"warmup_type": "linear"}, f"{file}: scheduler.params")
    drop_autos(params)


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
