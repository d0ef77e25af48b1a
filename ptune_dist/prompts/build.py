"""From config section `prompt` to a prompt at its start: the one place of this folder that sees a config."""

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from ptune_dist.config.foreign_values import name_value
from ptune_dist.config.messages import describe_first_error, describe_unknown_key, known_keys
from ptune_dist.config.schema import Config, PromptConfig
from ptune_dist.errors import UserError
from ptune_dist.prompts import METHODS
from ptune_dist.prompts.method import BaseFacts, Method, Options
from ptune_dist.prompts.start import NOTHING, Lookup, ReadExamples, Start


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
    start = prompt.init or method.default_start
    if start not in method.starts:
        known = ", ".join(method.starts)
        raise ValueError(f"prompt.init: {start} is not for {prompt.method}, which starts from {known}")
    return start


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
    file: str | None = None,
    read_examples: ReadExamples | None = None,
) -> Method:
    """The prompt that a member's config asks for. Without a start, its numbers will be loaded. Raises UserError.

    num_embeddings: the base's, where the tokenizer has ids beyond them. file: the one of several to start from.
    read_examples: token ids of the rows to train on.
    """
    prompt = config.prompt
    start = Start(
        kind=choose_start(prompt) if with_start else NOTHING,
        seed=config.seed,
        tokenizer=tokenizer,
        lookup=lookup,
        text=prompt.init_text,
        labels=prompt.init_labels or config.data.labels,
        file=file or next(iter(source_files(prompt)), None),
        num_embeddings=num_embeddings,
        tasks=list(config.data.tasks or []),
        read_examples=read_examples,
    )
    try:
        return find_method(prompt).build(check_options(prompt), prompt.num_virtual_tokens, base, start)
    except ValueError as error:
        raise UserError(str(error)) from None
