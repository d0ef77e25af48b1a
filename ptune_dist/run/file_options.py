"""Options that a prompt takes from the one it starts from: a run stores them, since that file may be gone later."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.prompts.build import check_options, find_method
from ptune_dist.prompts.method import Method
from ptune_dist.run.folder import has_begun

Configs = tuple[Config, dict[str, Config]]  # of a job, and of each of its members


def store_options(config: Config, members: dict[str, Config], prompts: Mapping[str, Method]) -> Configs:
    """The configs with what the prompts have taken from their files."""
    found = {name: prompt.settled_options() for name, prompt in prompts.items()}
    return fill(config, members, found)


def fill_options(config: Config, members: dict[str, Config]) -> Configs:
    """The configs with what a run that has begun has stored. Raises UserError for a run that cannot be read."""
    if not has_begun(Path(config.output_dir)):
        return config, members
    found = {}
    for name, member in members.items():
        file = Path(member.output_dir) / "config.yaml"
        if list_open(member) and file.is_file():
            stored = load_config(file).prompt
            if stored.method == member.prompt.method:
                found[name] = stored.model_extra or {}
    return fill(config, members, found)


def fill(config: Config, members: dict[str, Config], found: Mapping[str, Mapping[str, Any]]) -> Configs:
    """The configs with the open options of each member that are found. A sweep's own config leaves them open."""
    filled = {
        name: with_options(member, {key: found[name][key] for key in list_open(member) if key in found.get(name, {})})
        for name, member in members.items()
    }
    return config if config.sweep else next(iter(filled.values())), filled


def list_open(member: Config) -> list[str]:
    """The options that the file to start from decides."""
    if member.prompt.init != "file":
        return []
    options = check_options(member.prompt)
    return [key for key in find_method(member.prompt).of_file if getattr(options, key) is None]


def with_options(member: Config, options: dict[str, Any]) -> Config:
    return member.model_copy(update={"prompt": member.prompt.model_copy(update=options)})
