"""From config section `prompt` to a prompt at its start: the one place of this folder that sees a config."""

from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptune_dist.config.foreign_values import name_value
from ptune_dist.config.messages import describe_first_error, describe_unknown_key, known_keys
from ptune_dist.config.schema import Config, PromptConfig
from ptune_dist.errors import UserError
from ptune_dist.prompts import METHODS
from ptune_dist.prompts.head_start import read_head
from ptune_dist.prompts.method import BaseFacts, Method, Options
from ptune_dist.prompts.start import NOTHING, Lookup, ReadExamples, ReadRows, Start


def find_method(prompt: PromptConfig) -> type[Method]:
    """Raises ValueError that begins with the key."""
    if prompt.method not in METHODS:
        hint = name_value("prompt.method", prompt.method)
        raise ValueError(f"prompt.method: {prompt.method} is none of {', '.join(METHODS)}{hint}")
    return METHODS[prompt.method]


def check_options(prompt: PromptConfig) -> Options:
    """The method's own options, checked. Raises ValueError that begins with the key."""
    method = find_method(prompt)
    given = prompt.model_extra or {}
    own = method.options_type.model_fields
    for name in given:
        if name in own:
            continue
        owners = [other for other, found in METHODS.items() if name in found.options_type.model_fields]
        if owners:
            raise ValueError(f"prompt.{name} is for {' and '.join(owners)}, this is {prompt.method}")
        raise ValueError(describe_unknown_key(f"prompt.{name}", known_keys(Config) + list_option_keys()))
    try:
        return method.options_type.model_validate(given)
    except ValidationError as error:
        raise ValueError(describe_first_error(error, method.options_type, "prompt.")[1]) from None


def list_option_keys() -> list[str]:
    """The options of all methods as dotted keys."""
    return [key for method in METHODS.values() for key in known_keys(method.options_type, "prompt.")]


def choose_start(prompt: PromptConfig) -> str:
    """`prompt.init`, or the method's default. Raises ValueError that begins with the key."""
    method = find_method(prompt)
    start = prompt.init or ("text" if prompt.init_text else method.default_start)
    if start not in method.starts:
        known = ", ".join(method.starts)
        raise ValueError(f"prompt.init: {start} is not for {prompt.method}, which starts from {known}")
    return start


def settle_positions(prompt: PromptConfig) -> int:
    """`prompt.num_virtual_tokens`, which is 0 of methods without virtual tokens. Raises ValueError."""
    number = prompt.num_virtual_tokens
    if find_method(prompt).takes_positions:
        if number < 1:
            raise ValueError(f"prompt.num_virtual_tokens: {prompt.method} needs at least one virtual token")
        return number
    if number and "num_virtual_tokens" in prompt.model_fields_set:
        raise ValueError(
            f"prompt.num_virtual_tokens: {prompt.method} has no virtual tokens: set it to 0 or leave it out"
        )
    return 0


def choose_trained(prompt: PromptConfig, base: PreTrainedModel) -> set[str]:
    """Names of the base's parameters that a prompt's method trains. Raises UserError."""
    try:
        return find_method(prompt).choose_trained(check_options(prompt), base)
    except ValueError as error:
        raise UserError(str(error)) from None


def source_files(prompt: PromptConfig) -> list[str]:
    """What `prompt.init_file` names."""
    given = prompt.init_file or []
    return [given] if isinstance(given, str) else list(given)


def build_prompt(
    config: Config,
    base: BaseFacts,
    tokenizer: PreTrainedTokenizerBase,
    lookup: Lookup,
    *,
    with_start: bool,
    num_embeddings: int | None = None,
    rows: ReadRows | None = None,
    read_stored: Lookup | None = None,
    file: str | None = None,
    read_examples: ReadExamples | None = None,
) -> Method:
    """The prompt that a member's config asks for. Without a start, its numbers will be loaded. Raises UserError.

    num_embeddings: the base's, where the tokenizer has ids beyond them. rows: those to train on, if any, and
    read_examples the same as inputs and targets. read_stored: the base's embeddings as its files have them. file: the
    one of several to start from.
    """
    prompt = config.prompt
    asked = choose_start(prompt)
    start = Start(
        kind=asked if with_start else NOTHING,
        seed=config.seed,
        tokenizer=tokenizer,
        lookup=lookup,
        text=prompt.start_text,
        labels=prompt.init_labels or config.data.labels,
        file=file or next(iter(source_files(prompt)), None),
        num_embeddings=num_embeddings,
        asked=asked,
        placement=prompt.placement,
        rows=rows,
        tasks=list(config.data.tasks or []),
        read_stored=read_stored,
        read_examples=read_examples,
    )
    try:
        built = find_method(prompt).build(check_options(prompt), prompt.num_virtual_tokens, base, start)
    except ValueError as error:
        raise UserError(str(error)) from None
    if start.kind == "file":
        built.head_start = read_head(start, config.data.labels)
    return built
