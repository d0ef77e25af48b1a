"""The learning rate and the warm-up of a config that leaves them out: those of its method on this family of bases.

The one place where they are filled in. A run keeps the ones it was started with, whatever a later version's are.
"""

from pathlib import Path

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import UNKNOWN_STEPS, Config
from ptune_dist.config.sweep import naming_member
from ptune_dist.errors import UserError
from ptune_dist.families.family import Family
from ptune_dist.prompts.build import check_options, find_method
from ptune_dist.run.folder import has_begun

DEFAULTS_ARE_FOR = "adamw"  # the steps of other optimizers are of another size
KEYS = ("learning_rate", "warmup_steps")  # of `train`


def fill_training(config: Config, members: dict[str, Config], family: Family) -> tuple[Config, dict[str, Config]]:
    """The config and its members with every key of KEYS settled. Raises UserError for a run that cannot be read.

    A sweep's own config has what all its members agree on; it leaves out the rest.
    """
    has_run = has_begun(Path(config.output_dir))
    settled = {}
    for name, member in members.items():
        with naming_member(members, name, "prompt", "train"):
            settled[name] = settle(member, family, has_run=has_run)
    first = next(iter(settled.values())).train
    agreed = {
        key: getattr(first, key)
        for key in KEYS
        if len({getattr(member.train, key) for member in settled.values()}) == 1
    }
    return with_training(config, {key: agreed.get(key) for key in left_out(config)}), settled


def settle(member: Config, family: Family, *, has_run: bool) -> Config:
    """A member with what its stored run has, or else its method. Raises UserError for an optimizer without a rate."""
    missing = left_out(member)
    if not missing:
        return member
    method = find_method(member.prompt)
    defaults = method.choose_training(check_options(member.prompt), family.name)
    filled: dict[str, float | int] = {"warmup_steps": round(defaults.warmup_share * member.train.max_steps)}
    if member.train.optimizer == DEFAULTS_ARE_FOR:
        filled["learning_rate"] = defaults.learning_rate
    file = Path(member.output_dir) / "config.yaml"
    if has_run and file.is_file():
        stored = load_config(file).train
        filled |= {key: getattr(stored, key) for key in KEYS if getattr(stored, key) is not None}
    elif member.train.max_steps == UNKNOWN_STEPS:  # known once the rows are counted
        missing = [key for key in missing if key != "warmup_steps"]
    if "learning_rate" in missing and "learning_rate" not in filled:
        raise UserError(
            f"train.learning_rate is missing: the default of {member.prompt.method} is for {DEFAULTS_ARE_FOR}, and "
            f"train.optimizer is {member.train.optimizer}: give a rate"
        )
    return with_training(member, {key: filled[key] for key in missing})


def describe_warm_ups(members: dict[str, Config]) -> str:
    """The warm-up of each member, in one phrase where they agree."""
    steps = {name: member.train.num_warmup_steps for name, member in members.items()}
    if len(set(steps.values())) == 1:
        return f"warm-up {next(iter(steps.values())):,} steps"
    return "warm-up steps " + ", ".join(f"{number:,} ({name})" for name, number in steps.items())


def describe_rates(members: dict[str, Config]) -> str:
    """The highest learning rate of each member, in one phrase where they agree."""
    rates = {name: member.train.peak_rate for name, member in members.items()}
    if len(set(rates.values())) == 1:
        return f"learning rate {next(iter(rates.values())):g}"
    return "learning rates " + ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())


def left_out(config: Config) -> list[str]:
    """The keys of KEYS that a config does not have."""
    return [key for key in KEYS if getattr(config.train, key) is None]


def with_training(config: Config, values: dict[str, float | int | None]) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})
