"""How the base of a config reads examples: its family, its tokenizer, and each member's encoding.

Built once per command; everything that reads data takes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ptune_dist.base.layers import max_positions
from ptune_dist.base.open import make_without_memory
from ptune_dist.base.rotary import fixed_positions
from ptune_dist.base.source import largest_id, load_shape, load_tokenizer
from ptune_dist.config.prompt_text import Around
from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS, Config, DataConfig
from ptune_dist.config.sweep import naming_member
from ptune_dist.data.chat import Chat
from ptune_dist.data.encode import Encoding
from ptune_dist.errors import UserError
from ptune_dist.families.family import Family
from ptune_dist.families.find import find_family
from ptune_dist.objectives import OBJECTIVES
from ptune_dist.objectives.objective import Objective
from ptune_dist.prompts.build import check_options, find_method
from ptune_dist.prompts.method import Method
from ptune_dist.run.file_options import fill_options, store_options
from ptune_dist.run.resolve import resolve_whole
from ptune_dist.run.training_defaults import fill_training

DEFAULT_MAX_LENGTH = 512
MOST_RESERVED_POSITIONS = 8  # RoBERTa's first position is one more than the padding token's id


@dataclass(frozen=True)
class Reading:
    """A config whose base is known but not loaded."""

    config: Config
    members: dict[str, Config]  # each member's own config; one where there is no sweep
    family: Family
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    num_embeddings: int | None = None  # where the tokenizer has ids beyond them

    def encoding(self, member: Config) -> Encoding:
        """How a member's rows become token ids. Raises UserError."""
        data = member.data
        placement = self.config.prompt.placement
        framing = self.family.frame_text()
        return Encoding(
            self.tokenizer,
            replace(framing, is_bare=True) if data.is_chat else framing,
            self.family.build_targets(self.objective.target, self.tokenizer, data.labels, data.append_eos),
            max_length=data.max_length or DEFAULT_MAX_LENGTH,
            placement=placement,
            truncation_side=data.truncation_side,
            num_embeddings=self.num_embeddings,
            needs_rest=placement in ("infix", "template") and not find_method(member.prompt).stands_in_sequence,
            chat=build_chat(data, self.tokenizer, member.prompt.around),
            around=Around() if data.messages is not None else member.prompt.around,
        )

    def with_micro_batch(self, tokens: int) -> "Reading":
        """The same with a number for `train.micro_batch_tokens`."""

        def settle(config: Config) -> Config:
            return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_tokens": tokens})})

        members = {name: settle(member) for name, member in self.members.items()}
        return replace(self, config=settle(self.config), members=members)

    def with_file_options(self, prompts: Mapping[str, Method]) -> "Reading":
        """The same with the options that prompts have taken from the files they start from."""
        config, members = store_options(self.config, self.members, prompts)
        return replace(self, config=config, members=members)


def build_reading(config: Config) -> Reading:
    """Raises UserError, also for what the config asks of a base that cannot do it."""
    config, members = resolve_whole(config)
    shape = load_shape(config.model.path)
    family = find_family(shape, config.model.family, config.model.path)
    objective = OBJECTIVES[config.train.objective].build(config.train)
    check_family_fits(config, members, family, objective)
    check_cache(config, members, family, shape)
    config, members = fill_max_length(config, members, family)
    config, members = fill_options(config, members)
    config, members = fill_training(config, members, family)
    tokenizer = read_tokenizer(config, family, shape)
    end_turns(config, family, objective, tokenizer)
    num_embeddings = shape.get_text_config().vocab_size
    has_more = largest_id(tokenizer) >= num_embeddings
    return Reading(config, members, family, tokenizer, objective, num_embeddings if has_more else None)


def fill_max_length(config: Config, members: dict[str, Config], family: Family) -> tuple[Config, dict[str, Config]]:
    """Settle `data.max_length` where it is left out: the default, or what a base's learned positions leave room for.

    A sweep's own config stays as it is: each member has its own number. Raises UserError.
    """
    if all(member.data.max_length is not None for member in members.values()):
        return config, members
    shape = load_shape(config.model.path)
    stated = getattr(shape.get_text_config(), "max_position_embeddings", None)
    num_virtual = max(member.prompt.num_virtual_tokens for member in members.values())
    most = None
    has_few = stated is not None and DEFAULT_MAX_LENGTH + num_virtual > stated - MOST_RESERVED_POSITIONS
    if has_few or shape.model_type == "mpt":  # whose table of positions has another name
        family.prepare_shape(shape, config.data.labels)
        most = max_positions(make_without_memory(shape, config.model.path, family, torch.float32))

    def settle(member: Config) -> Config:
        if member.data.max_length is not None:
            return member
        left = limit_default(shape, most, member.prompt.num_virtual_tokens)
        if left < 1:
            raise UserError(
                f"prompt.num_virtual_tokens: {member.prompt.num_virtual_tokens} leave no position for the rows: the "
                f"base has {left + member.prompt.num_virtual_tokens}"
            )
        return member.model_copy(update={"data": member.data.model_copy(update={"max_length": left})})

    settled = {name: settle(member) for name, member in members.items()}
    return config if config.sweep else settle(config), settled


def find_most_positions(reading: Reading) -> int | None:
    """The most tokens that the base was made to read; None where nothing limits them. Raises UserError."""
    path = reading.config.model.path
    shape = load_shape(path)
    stated = getattr(shape.get_text_config(), "max_position_embeddings", None)
    fixed = fixed_positions(shape)
    reading.family.prepare_shape(shape, reading.config.data.labels)
    learned = max_positions(make_without_memory(shape, path, reading.family, torch.float32))
    return min((limit for limit in (learned, fixed, stated) if limit is not None), default=None)


def limit_default(shape: PretrainedConfig, most: int | None, num_virtual: int) -> int:
    """The default of `data.max_length`, or what `most` learned positions or fixed rotary frequencies leave of it."""
    limits = [limit for limit in (most, fixed_positions(shape)) if limit is not None]
    return min([DEFAULT_MAX_LENGTH, *(limit - num_virtual for limit in limits)])


def read_tokenizer(config: Config, family: Family, shape: PretrainedConfig) -> PreTrainedTokenizerBase:
    """A family with a classification head writes no text, so its tokenizer needs no token to end with."""
    return load_tokenizer(config.model.path, shape, with_eos=not family.trains_head)


def build_chat(data: DataConfig, tokenizer: PreTrainedTokenizerBase, around: Around) -> Chat | None:
    """What writes a config's rows as chats, if they are.

    around: texts around data.template; where the rows are conversations, they are part of the system prompt.
    """
    if not data.is_chat:
        return None
    if data.chat:
        return Chat(tokenizer, "data.chat", data.system)
    return Chat(tokenizer, "data.messages", data.system, "\n".join(text for _, text in around.before + around.after))


def end_turns(config: Config, family: Family, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> None:
    """With chats, have answers end as the chat template ends a turn. Raises UserError where it cannot be used."""
    chat = build_chat(config.data, tokenizer, config.prompt.around)
    if chat is None:
        return
    if family.name != "causal" or objective.target != "text":
        raise UserError(f"{chat.key}: chats are for causal bases that answer with a text: leave it out")
    end = chat.find_end(has_tools=config.data.tools is not None)
    if end is not None:
        tokenizer.eos_token = end


def check_family_fits(config: Config, members: dict[str, Config], family: Family, objective: Objective) -> None:
    """Raise UserError for a placement, method, sweep or objective that this family does not have."""
    placement = config.prompt.placement
    if placement not in family.placements:
        wanted = {"infix": "causal", "template": "causal"}.get(placement, "seq2seq")
        raise UserError(
            f"prompt.placement: {placement} is for {wanted} bases; {config.model.path} is {family.name}: use prefix"
        )
    for name, member in members.items():
        method = find_method(member.prompt)
        if method.families is not None and family.name not in method.families:
            bases = " and ".join(method.families)
            with naming_member(members, name, "prompt"):
                raise UserError(
                    f"prompt.method: {member.prompt.method} is for {bases} bases; {config.model.path} is {family.name}"
                )
        if config.sweep and method.changes_base:
            raise UserError(
                f"sweep: {member.prompt.method} trains tensors of the base, which all members share: use a run for each"
            )
    if config.sweep and family.trains_head:
        path = config.model.path
        raise UserError(f"sweep: a prompt over an encoder trains the base's head too, of which {path} has one")
    if config.sweep and config.model.random_init and len({member.seed for member in members.values()}) > 1:
        raise UserError("sweep.seed: with model.random_init each seed makes a base of its own: set it to false")
    if family.trains_head and objective.target == "text" and not config.data.labels:
        raise UserError("data.labels is missing: an encoder's head needs the labels that it tells apart")


def check_cache(config: Config, members: dict[str, Config], family: Family, shape: PretrainedConfig) -> None:
    """Raise UserError for a context cache where a member's prompt precedes every token in every layer."""
    keys = ("context_cache_gib", "context_cache_gpu_gib", "context_cache_dir")
    given = [key for key in keys if getattr(config.train, key)]
    placement = config.prompt.placement
    early = [name for name, member in members.items() if not enters_late(member)]
    if not given or placement in PLACEMENTS_WITH_CONTEXTS or not early:
        return
    others = list_cacheable(config, members, family, shape)
    advice = f", or set prompt.placement to {'one of ' * (len(others) > 1)}{', '.join(others)}" if others else ""
    with naming_member(members, early[0], "prompt"):
        raise UserError(
            f"train.{given[0]} is given but placement {placement} has no contexts to keep: leave it out{advice}"
        )


def enters_late(member: Config) -> bool:
    """Whether the layers below a member's prompt leave something to keep."""
    return find_method(member.prompt).enters_late(check_options(member.prompt))


def list_cacheable(config: Config, members: dict[str, Config], family: Family, shape: PretrainedConfig) -> list[str]:
    """The placements with contexts that the methods of all members, the family and this base have."""
    own = [find_method(member.prompt).placements or family.placements for member in members.values()]
    known = [name for name in PLACEMENTS_WITH_CONTEXTS if all(name in some for some in [family.placements, *own])]
    family.prepare_shape(shape, config.data.labels)
    base = make_without_memory(shape, config.model.path, family, torch.float32)
    found = []
    for name in known:
        try:
            family.check_contexts(base, name)
        except UserError:
            continue
        found.append(name)
    return found
