"""The typed config: YAML and `key.path=value` overrides in, one validated `Config` out.

Floor 0: no torch here, so that a login node can read a config in a fraction of a second.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ptune_dist.config.sweep import check_sweep, fill_from_members, map_paths, render_members
from ptune_dist.config.yaml_file import apply_override, read_yaml
from ptune_dist.errors import UserError


def refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # YAML's yes and true are 1 to pydantic
        raise ValueError("a number is needed")
    return value


Positive = Annotated[int, BeforeValidator(refuse_bool), Field(gt=0)]
NotNegative = Annotated[int, BeforeValidator(refuse_bool), Field(ge=0)]
Real = Annotated[float, BeforeValidator(refuse_bool), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, lt=1)]
Label = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value)]
Metric = Literal["loss", "perplexity", "exact_match", "accuracy"]
Sweep = Annotated[dict[str, list[Any]] | list[dict[str, Any]], BeforeValidator(check_sweep)]
# Which way each metric gets better.
HIGHER_IS_BETTER: dict[str, bool] = {"loss": False, "perplexity": False, "exact_match": True, "accuracy": True}
PLACEMENTS_WITH_CONTEXTS = ("infix", "template", "decoder")  # tokens stand before the prompt, and depend on none
PROMPT_MARKER = re.compile(r"\{\{-?\s*prompt\s*-?\}\}")  # in data.template, for placement template


class Section(BaseModel):
    """Part of the config: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    path: str  # local folder or hub name
    family: Literal["auto", "causal", "seq2seq", "encoder"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "int8"] = "none"  # int8: of the frozen linear layers' weights
    int8_include: list[Literal["head", "embeddings"]] = []  # in int8 too
    int8_activations: bool = False  # LLM.int8(): multiply in int8; faster on some devices, coarser everywhere
    int8_threshold: Annotated[Real, Field(ge=0)] = 6.0  # int8_activations: inputs with an entry beyond it stay float
    random_init: bool = False  # build from the shape alone: benchmarks without weights

    @model_validator(mode="after")
    def check_int8(self) -> "ModelConfig":
        for key in ("int8_include", "int8_activations"):
            if getattr(self, key) and self.quantization != "int8":
                raise ValueError(f"model.{key} is given but model.quantization is {self.quantization}: set it to int8")
        return self


class PromptConfig(Section):
    method: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: Positive = 20
    # prefix: [prompt, input, target]; infix: [input, prompt, target]; template: where {{ prompt }} stands in
    # data.template; encoder and decoder: before the input, or the target, of a seq2seq base
    placement: Literal["prefix", "infix", "template", "encoder", "decoder"] = "prefix"
    init: Literal["random", "vocab", "text", "labels", "file"] = "vocab"
    init_text: str | None = None  # init: text
    init_labels: list[Label] | None = None  # init: labels; data.labels where left out
    init_file: str | None = None  # init: file, a run, a prompt folder or a PEFT adapter

    @model_validator(mode="after")
    def check_init(self) -> "PromptConfig":
        for kind in ("text", "file"):
            given = getattr(self, f"init_{kind}")
            if self.init == kind and not given:
                raise ValueError(f"prompt.init: {kind} needs prompt.init_{kind}")
            if given and self.init != kind:
                raise ValueError(f"prompt.init_{kind} is given but prompt.init is {self.init}: set prompt.init={kind}")
        if self.init_labels and self.init != "labels":
            raise ValueError(f"prompt.init_labels is given but prompt.init is {self.init}: set prompt.init=labels")
        return self


class DataConfig(Section):
    train: str
    validation: str | None = None
    template: str | None = None  # jinja2 over a row's columns; needed unless the data is .txt
    target: str | None = None
    labels: list[Label] | None = None  # the values of the target's one column, for accuracy by likelihood
    max_length: Positive = 512  # input and target tokens of one example, virtual tokens apart
    truncation_side: Literal["left", "right"] = "left"  # the end of the input that is cut
    append_eos: bool = True  # the target ends with the tokenizer's end-of-sequence token


class TrainConfig(Section):
    max_steps: Positive = 1000
    batch_size: Positive = 32  # examples per optimizer step, over all ranks
    micro_batch_tokens: Positive = 8192  # most positions one rank processes at a time
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    learning_rate: Annotated[Real, Field(gt=0, le=1e30)] = 0.3  # above, a step leaves float32
    weight_decay: Annotated[Real, Field(ge=0, le=1e6)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)  # adamw
    eps: Annotated[Real, Field(gt=0)] = 1e-8  # adamw
    momentum: Share = 0.0  # sgd
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NotNegative = 0
    max_grad_norm: Annotated[Real, Field(ge=0)] = 1.0  # 0: no clipping
    context_cache_gib: Annotated[Real, Field(ge=0)] = 0.0  # of contexts' keys and values, kept in memory by each rank
    context_cache_dir: str | None = None  # a folder for those that memory does not hold
    resume: Literal["auto", "never"] = "auto"
    hang_timeout_s: Annotated[Real, Field(ge=0)] = 600.0  # a rank without progress for so long ends the job; 0: never


class EvaluateConfig(Section):
    every: NotNegative = 200  # steps; 0: only before and after training
    metrics: list[Metric] = ["loss"]
    best_metric: Metric | None = None  # keeps the best prompt; the first of `metrics` where left out
    patience: NotNegative = 0  # stop after so many evaluations without a better one; 0: never
    max_examples: NotNegative = 0  # judge on the first so many rows; 0: all
    max_new_tokens: Positive = 32
    num_samples: NotNegative = 5  # generated answers shown at each evaluation

    @property
    def best(self) -> str:
        return self.best_metric or (self.metrics[0] if self.metrics else "loss")


class CheckpointConfig(Section):
    every: NotNegative = 100  # steps; 0: only at the end
    keep: Positive = 2


class HalvingConfig(Section):
    """Successive halving (Jamieson and Talwalkar, 2016): only the members best on validation go on."""

    every: Positive  # steps
    keep: Annotated[Real, Field(gt=0, lt=1)]  # the share of the members that go on


class Config(Section):
    output_dir: str
    seed: Annotated[NotNegative, Field(lt=2**32)] = 0
    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: str | dict[str, Any] | None = None  # a DeepSpeed JSON file, or its content
    sweep: Sweep | None = None  # {key: values}: every combination is a member; [{key: value}, ...]: each mapping is one
    sweep_halving: HalvingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def fill_what_members_give(cls, raw: Any) -> Any:
        return fill_from_members(raw)

    @model_validator(mode="after")
    def check_across_sections(self) -> "Config":
        is_text = self.data.train.lower().endswith(".txt")
        if not is_text and (self.data.template is None or self.data.target is None):
            raise ValueError("data.template and data.target are needed unless data.train is a .txt file")
        if is_text and {"exact_match", "accuracy"} & set(self.evaluate.metrics):
            raise ValueError("evaluate.metrics: a .txt file has no targets to match, use loss and perplexity")
        if "accuracy" in self.evaluate.metrics and not self.data.labels:
            raise ValueError("evaluate.metrics: accuracy needs data.labels, the values that the target can take")
        if self.evaluate.best_metric and self.evaluate.best_metric not in ("loss", *self.evaluate.metrics):
            raise ValueError(f"evaluate.best_metric: {self.evaluate.best_metric} is not among evaluate.metrics")
        if self.prompt.init == "labels" and not (self.prompt.init_labels or self.data.labels):
            raise ValueError("prompt.init: labels needs prompt.init_labels or data.labels")
        if self.evaluate.patience and not (self.evaluate.every and self.data.validation):
            raise ValueError("evaluate.patience needs data.validation and evaluate.every above 0")
        if self.train.warmup_steps >= self.train.max_steps:
            raise ValueError("train.warmup_steps must be less than train.max_steps")
        if self.sweep_halving and not self.sweep:
            raise ValueError("sweep_halving needs sweep, the members of which it keeps some")
        return self

    @model_validator(mode="after")
    def check_placement(self) -> "Config":
        placement = self.prompt.placement
        if placement != "prefix" and self.data.train.lower().endswith(".txt"):
            raise ValueError(f"prompt.placement: {placement} needs an input and a .txt file has none, use prefix")
        found = len(PROMPT_MARKER.findall(self.data.template or ""))
        if placement == "template" and found != 1:
            raise ValueError(f"prompt.placement: template needs {{{{ prompt }}}} once in data.template, found {found}")
        for key in ("context_cache_gib", "context_cache_dir"):
            if getattr(self.train, key) and placement not in PLACEMENTS_WITH_CONTEXTS:
                raise ValueError(
                    f"train.{key} is given but placement {placement} has no contexts to keep: "
                    f"leave it out, or set prompt.placement to one of {', '.join(PLACEMENTS_WITH_CONTEXTS)}"
                )
        return self


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key.path=value` overrides, validate.

    Relative paths of files are looked up from the current folder, then from the config's own; those found are made
    absolute, so that a run can be evaluated from anywhere. Every member of a sweep is validated too. Raises UserError
    naming the file and the key.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(describe_validation_error(error, path, overrides)) from None
    config = resolve_paths(config, Path(path).resolve().parent)
    check_members(config, name_place("sweep", path, overrides))
    return config


def check_members(config: Config, place: str) -> None:
    """Raise UserError, beginning with `place`, unless every member of the sweep is a config of its own."""
    names: dict[str, str] = {}
    for name, raw in render_members(config).items():
        try:
            member = Config.model_validate(raw)
        except ValidationError as error:
            raise UserError(f"{place}: sweep: {name}: {describe_first_error(error)[1]}") from None
        if config.sweep_halving and not member.data.validation:
            raise UserError(f"{place}: sweep: {name}: sweep_halving needs data.validation")
        same = names.setdefault(member.model_dump_json(exclude={"output_dir"}), name)
        if same != name:
            raise UserError(f"{place}: sweep: {same} and {name} are the same member, leave one out")


def describe_validation_error(error: ValidationError, path: str | Path, overrides: list[str]) -> str:
    """The first thing wrong, in one line: file (or command line), key, what, and the nearest known key."""
    key, what = describe_first_error(error)
    return f"{name_place(key, path, overrides)}: {what}"


def name_place(key: str, path: str | Path, overrides: list[str]) -> str:
    """Where a key was given: the command line, if it, its section or a key below it was, else the file."""
    given = [override.partition("=")[0] for override in overrides]
    from_command_line = key and any(f"{key}.".startswith(f"{g}.") or f"{g}.".startswith(f"{key}.") for g in given)
    return "command line" if from_command_line else str(path)


def describe_first_error(error: ValidationError) -> tuple[str, str]:
    """The key of the first thing wrong ("" where it is several keys'), and what is wrong, the key named."""
    # An unknown key first: where a key is misspelt, the right one is missing too.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function", "dict", "str")))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(Config), n=1, cutoff=0.5) or difflib.get_close_matches(
            key.rpartition(".")[2], [k.rpartition(".")[2] for k in known_keys(Config)], n=1, cutoff=0.6
        )
        hint = f", did you mean {near[0]}?" if near else ""
        return key, f"unknown key {key}{hint}"
    if first["type"] == "missing":
        return key, f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith(key):  # a check of several keys, or of a sweep's, names them itself
        return key, message
    shown = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return key, f"{key}: {message}{shown}"


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the config."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a section or None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def resolve_paths(config: Config, config_dir: Path) -> Config:
    """Make the paths of files and folders that exist absolute; other names (a hub's, say) stay as they are."""

    def resolve(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        value = os.path.expanduser(value)
        name, colon, split = value.rpartition(":") if ":" in value else (value, "", "")  # a saved folder's FOLDER:SPLIT
        for folder in (Path.cwd(), config_dir):
            if (folder / value).exists():
                return os.path.abspath(folder / value)
            if colon and (folder / name).is_dir():
                return os.path.abspath(folder / name) + colon + split
        return value

    cache_dir = config.train.context_cache_dir
    if cache_dir:  # a run makes it
        cache_dir = os.path.abspath(os.path.expanduser(cache_dir))
    return config.model_copy(
        update={
            "output_dir": os.path.expanduser(config.output_dir),
            "model": config.model.model_copy(update={"path": resolve(config.model.path)}),
            "prompt": config.prompt.model_copy(update={"init_file": resolve(config.prompt.init_file)}),
            "data": config.data.model_copy(
                update={"train": resolve(config.data.train), "validation": resolve(config.data.validation)}
            ),
            "train": config.train.model_copy(update={"context_cache_dir": cache_dir}),
            "deepspeed": resolve(config.deepspeed),
            "sweep": map_paths(config.sweep, resolve),
        }
    )


def render_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
