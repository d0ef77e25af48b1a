"""How the base of a config reads examples: its family, its tokenizer, and each member's encoding.

Built once per command; everything that reads data takes it.
"""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ptune_dist.base.source import load_shape, load_tokenizer
from ptune_dist.config.schema import Config
from ptune_dist.data.encode import Encoding
from ptune_dist.errors import UserError
from ptune_dist.families.family import Family
from ptune_dist.families.find import find_family
from ptune_dist.objectives import OBJECTIVES
from ptune_dist.objectives.objective import Objective
from ptune_dist.prompts.build import find_method
from ptune_dist.run.resolve import resolve_whole


@dataclass(frozen=True)
class Reading:
    """A config whose base is known but not loaded."""

    config: Config
    members: dict[str, Config]  # each member's own config; one where there is no sweep
    family: Family
    tokenizer: PreTrainedTokenizerBase
    objective: Objective

    def encoding(self, member: Config) -> Encoding:
        """How a member's rows become token ids. Raises UserError."""
        data = member.data
        return Encoding(
            self.tokenizer,
            self.family.frame_text(),
            self.family.build_targets(self.objective.target, self.tokenizer, data.labels, data.append_eos),
            max_length=data.max_length,
            placement=self.config.prompt.placement,
            truncation_side=data.truncation_side,
        )

    def with_micro_batch(self, tokens: int) -> "Reading":
        """The same with a number for `train.micro_batch_tokens`."""

        def settle(config: Config) -> Config:
            return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_tokens": tokens})})

        members = {name: settle(member) for name, member in self.members.items()}
        return replace(self, config=settle(self.config), members=members)


def build_reading(config: Config) -> Reading:
    """Raises UserError, also for what the config asks of a base that cannot do it."""
    config, members = resolve_whole(config)
    shape = load_shape(config.model.path)
    family = find_family(shape, config.model.family, config.model.path)
    objective = OBJECTIVES[config.train.objective].build(config.train)
    check_family_fits(config, members, family, objective)
    return Reading(config, members, family, read_tokenizer(config, family, shape), objective)


def read_tokenizer(config: Config, family: Family, shape: PretrainedConfig) -> PreTrainedTokenizerBase:
    """A family with a classification head writes no text, so its tokenizer needs no token to end with."""
    return load_tokenizer(config.model.path, shape, with_eos=not family.trains_head)


def check_family_fits(config: Config, members: dict[str, Config], family: Family, objective: Objective) -> None:
    """Raise UserError for a placement, method, sweep or objective that this family does not have."""
    placement = config.prompt.placement
    if placement not in family.placements:
        wanted = {"infix": "causal", "template": "causal"}.get(placement, "seq2seq")
        raise UserError(
            f"prompt.placement: {placement} is for {wanted} bases; {config.model.path} is {family.name}: use prefix"
        )
    for member in members.values():
        method = find_method(member.prompt)
        if method.families is not None and family.name not in method.families:
            bases = " and ".join(method.families)
            raise UserError(
                f"prompt.method: {member.prompt.method} is for {bases} bases; {config.model.path} is {family.name}"
            )
    if config.sweep and family.trains_head:
        path = config.model.path
        raise UserError(f"sweep: a prompt over an encoder trains the base's head too, of which {path} has one")
    if config.sweep and config.model.random_init and len({member.seed for member in members.values()}) > 1:
        raise UserError("sweep.seed: with model.random_init each seed makes a base of its own: set it to false")
    if family.trains_head and objective.target == "text" and not config.data.labels:
        raise UserError("data.labels is missing: an encoder's head needs the labels that it tells apart")
