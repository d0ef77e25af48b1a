"""A `resolve` for `load_config` with two small methods and a few names, as a caller supplies it."""

from pydantic import ValidationError

from ptune_dist.config.messages import describe_first_error, describe_unknown_key
from ptune_dist.config.schema import Config, Positive, PromptConfig, Section

SMALL = """\
output_dir: runs/x
model: {path: some/base}
data: {train: rows.jsonl, template: "{{ text }}", target: " {{ label }}"}
"""
OBJECTIVES = ("cross_entropy",)


class NoOptions(Section):
    """A method without options of its own."""


class LayeredOptions(Section):
    """A method with two options."""

    num_layers: Positive = 2
    width: int | None = None


OPTIONS = {"prompt_tuning": NoOptions, "layered": LayeredOptions}


def resolve(config: Config) -> Config:
    """The config with the defaults of its method; ValueError, beginning with the key, for what is unknown."""
    if config.train.objective not in OBJECTIVES:
        raise ValueError(f"train.objective: unknown objective {config.train.objective!r}")
    method = config.prompt.method
    if method not in OPTIONS:
        raise ValueError(f"prompt.method: unknown method {method!r}")
    given = config.prompt.model_extra
    for name in given:
        owners = [owner for owner, options in OPTIONS.items() if name in options.model_fields]
        if not owners:
            known = [f"prompt.{key}" for key in (*PromptConfig.model_fields, *OPTIONS[method].model_fields)]
            raise ValueError(describe_unknown_key(f"prompt.{name}", known))
        if method not in owners:
            raise ValueError(f"prompt.{name} is for {', '.join(owners)}, this is {method}")
    try:
        options = OPTIONS[method].model_validate(given)
    except ValidationError as error:
        raise ValueError(describe_first_error(error, OPTIONS[method], "prompt.")[1]) from None
    return config.model_copy(update={"prompt": config.prompt.model_copy(update=options.model_dump())})
