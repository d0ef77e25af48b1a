"""The part of a config's checks that needs the seams: names of methods, objectives and families."""

from ptune_dist.config.load import resolve_outside_sweep
from ptune_dist.config.schema import OWN_SCHEDULES, Config, TrainConfig
from ptune_dist.config.sweep import expand_sweep, sweep_keys
from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.objectives import OBJECTIVES
from ptune_dist.optim.schedules import build_curve
from ptune_dist.prompts import METHODS
from ptune_dist.prompts.build import check_options, choose_start, find_method, settle_positions
from ptune_dist.run.trackers import check_trackers


def resolve(config: Config) -> Config:
    """Check a config, or a member's, and fill in what its method leaves open.

    For `config.load.load_config`. Raises ValueError that begins with the key.
    """
    check_family(config)
    check_objective(config)
    check_schedule(config.train)
    check_trackers(config.train.report_to)
    prompt = config.prompt
    method = find_method(prompt)
    options = check_options(prompt)
    if method.placements is not None and prompt.placement not in method.placements:
        *others, last = method.placements
        known = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"prompt.placement: {prompt.method} is for placement {known}")
    if prompt.placement == "both" and method.placements is None:
        owners = " and ".join(name for name, found in METHODS.items() if "both" in (found.placements or ()))
        raise ValueError(f"prompt.placement: both is for {owners}; {prompt.method} has encoder and decoder")
    if not method.stands_in_sequence and config.data.is_plain_text:
        raise ValueError(f"prompt.method: {prompt.method} needs an input before the target, and a .txt file has none")
    is_of_members = "prompt.method" in sweep_keys(config.sweep)
    positions = prompt.num_virtual_tokens if is_of_members else settle_positions(prompt)
    filled = {"init": choose_start(prompt), "num_virtual_tokens": positions, **options.model_dump()}
    return config.model_copy(update={"prompt": prompt.model_copy(update=filled)})


def resolve_whole(config: Config) -> tuple[Config, dict[str, Config]]:
    """A config and its members, resolved; one that a command has read is resolved already. Raises UserError."""
    try:
        resolved = resolve_outside_sweep(config, resolve)
        return resolved, expand_sweep(resolved, resolve)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_schedule(train: TrainConfig) -> None:
    """Raise ValueError for options that a schedule of transformers does not take, or lacks."""
    if train.schedule in OWN_SCHEDULES:
        return
    try:
        known = {"learning_rate": train.learning_rate or 1.0, "warmup_steps": train.warmup_steps or 0}
        build_curve(train.model_copy(update=known))(known["warmup_steps"])
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"train.schedule_options: {train.schedule}: {reason}") from None


def check_family(config: Config) -> None:
    asked = config.model.family
    if asked != "auto" and asked not in FAMILIES:
        raise ValueError(f"model.family: {asked} is none of auto, {', '.join(FAMILIES)}")


def check_objective(config: Config) -> None:
    name = config.train.objective
    if name not in OBJECTIVES:
        raise ValueError(f"train.objective: {name} is none of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[name].build(config.train)
    if objective.target == "number":
        if config.data.is_plain_text:
            raise ValueError(f"train.objective: {name} needs data.target, a number, and a .txt file has none")
        if config.data.labels:
            raise ValueError(f"data.labels is given but train.objective is {name}, whose targets are numbers")
