"""The config: every key with its type, default and meaning, and the checks that span several keys.

The string under a key is its description: `docs/configuration.md` is generated from these. No torch is imported here,
so that a login node reads a config in a fraction of a second.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ptune_dist.config.fields import (
    MOST,
    Interval,
    Label,
    NotNegative,
    OptionalFolder,
    PathText,
    Positive,
    Real,
    Section,
    Share,
    Sources,
    at_most,
    read_held_out,
    refuse_text_but_auto,
    refuse_twice,
)
from ptune_dist.config.sections import CsvConfig, ModelConfig, PromptConfig, TaskFiles
from ptune_dist.config.sweep import check_sweep, fill_from_members
from ptune_dist.metrics import METRICS


def check_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric, use one of {', '.join(METRICS)}")
    return name


Metric = Annotated[str, AfterValidator(check_metric)]
Sweep = Annotated[dict[str, list[Any]] | list[dict[str, Any]], BeforeValidator(check_sweep)]
UNKNOWN_STEPS = MOST  # `max_steps` until the rows are counted
OWN_SCHEDULES = ("constant", "linear", "cosine", "constant_with_warmup")
Schedule = Literal[
    "constant",
    "linear",
    "cosine",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
PLACEMENTS_WITH_CONTEXTS = ("infix", "template", "decoder")  # tokens stand before the prompt, and depend on none
PROMPT_MARKER = re.compile(r"\{\{-?\s*prompt\s*-?\}\}")  # in data.template, for placement template


def list_sources(value: Any) -> list[str]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


class DataConfig(Section):
    """The examples, and how a row becomes an input and a target."""

    train: Sources
    """The training rows: a .jsonl (.ndjson), .json, .csv, .tsv, .txt or .parquet file, a folder saved by `datasets`, or
    a dataset on the hub (`NAME`, `NAME@CONFIG`, `NAME:SPLIT`). Several of them as a list, or files as `parts/*.jsonl`,
    are read one after another."""

    validation: Annotated[Sources | int | float | None, BeforeValidator(read_held_out)] = None
    """The validation rows, in the same forms. Or a number such as `500`, or a share such as `0.1`: so many of the
    training rows are drawn, kept out of training, and named in the run's split.json."""

    split_seed: Annotated[NotNegative, Field(lt=2**32)] = 0
    """Which of the training rows are drawn for validation. `seed` does not change them."""

    max_examples: Positive | None = None
    """Only the first so many rows of `train` are read, before validation rows are drawn from them."""

    csv: CsvConfig = CsvConfig()
    """How .csv and .tsv files are written."""

    template: str | None = None
    """The input: jinja2 over the columns of a row. Needed unless the data is a .txt file."""

    target: str | None = None
    """The expected output: jinja2 over the columns of a row. The loss is computed only here."""

    references: str | None = None
    """A column with the acceptable answers of a row, a text or a list of texts, for the metrics that compare generated
    answers: the best one counts. `answers.text` is what `text` holds inside column `answers`. The target where left
    out. Where `target` prints all of the column, as in `{{ answers }}`, each epoch trains on one of them, drawn by
    `seed`, and the validation loss is that of the first."""

    chat: bool = False
    """Write input and target as a user's and an assistant's turn, by the chat template of the base's tokenizer: for
    bases that are trained on chats."""

    messages: str | None = None
    """The column that holds a conversation, in place of `template` and `target`: a list of messages with `role` and
    `content`, written by the base's chat template. Every turn of the assistant is learned, and nothing else."""

    system: str | None = None
    """The system prompt of chats that have none of their own."""

    tools: str | None = None
    """The column that holds the tools a conversation may use, as the base's chat template takes them."""

    on_error: Literal["stop", "skip"] = "stop"
    """What a row does that cannot be used: without a value, with an empty target or one that does not fit. `skip`: it
    is counted and named in the run's skipped_rows.jsonl."""

    labels: Annotated[list[Label], AfterValidator(refuse_twice)] | None = None
    """The values that the target's one column can take: for accuracy by likelihood, for `init: labels`, and as the
    classes of an encoder base."""

    task: str | None = None
    """The column that names a row's task, where the rows are of several tasks: metrics are computed for each one too,
    and `multitask_prompt_tuning` learns a prompt for each."""

    tasks: Annotated[list[Label], AfterValidator(refuse_twice)] | dict[Label, TaskFiles] | None = None
    """The tasks: the values of column `data.task`. Or, for rows that are in a file of their own for each task, each
    task's name with its `train` and `validation`; templates then find the name in column `task`."""

    optional_columns: list[str] = []
    """Columns that a row may lack: missing or null, they are empty text. A column that the template tests
    (`{% if input %}`) need not be listed."""

    max_length: Positive | None = None
    """The most tokens of one example, input and target together, without virtual tokens. A longer input is cut; a
    target never is. Where left out: 512, or what the base's learned positions leave room for."""

    truncation_side: Literal["left", "right"] = "left"
    """The end of the input that is cut."""

    append_eos: bool = True
    """Whether the target ends with the tokenizer's end-of-sequence token."""

    cache_dir: OptionalFolder = "auto"
    """The folder in which token ids of large data are kept for all ranks and for restarts. `auto`: below the user's
    cache folder. `off` or `null`: every rank reads all rows at every start."""

    cache_gib: Annotated[Real, Field(gt=0)] = 64.0
    """The most that `cache_dir` keeps. What was not used for the longest time is removed first."""

    @model_validator(mode="before")
    @classmethod
    def fill_from_tasks(cls, raw: Any) -> Any:
        """`train` and `validation` of the first task that has them, where each task has files of its own."""
        tasks = raw.get("tasks") if isinstance(raw, dict) else None
        if not isinstance(tasks, dict):
            return raw
        filled = dict(raw)
        for key in ("train", "validation"):
            found = [files[key] for files in tasks.values() if isinstance(files, dict) and files.get(key)]
            if found and filled.get(key) not in (None, found[0]):
                raise ValueError(f"data.{key} is given, but data.tasks names the files of each task: leave it out")
            if found:
                filled[key] = found[0]
        return filled

    @model_validator(mode="after")
    def check_chat(self) -> "DataConfig":
        if self.messages is not None:
            for key in ("template", "target", "labels"):
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key} and data.messages are both given: leave one out")
        if self.chat and self.messages is not None:
            raise ValueError("data.chat is for data.template, and data.messages is given: leave one out")
        if self.chat and self.is_plain_text:
            raise ValueError("data.chat needs an input and a target, and a .txt file has none")
        if self.system is not None and not self.is_chat:
            raise ValueError("data.system needs data.chat or data.messages")
        if self.tools is not None and self.messages is None:
            raise ValueError("data.tools needs data.messages")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether the base's chat template writes the rows."""
        return self.chat or self.messages is not None

    @property
    def holds_out(self) -> bool:
        """Whether the validation rows are drawn from the training rows."""
        return isinstance(self.validation, (int, float))

    @property
    def train_sources(self) -> list[str]:
        return list_sources(self.train)

    @property
    def validation_sources(self) -> list[str]:
        """Where validation rows are read, if they have sources of their own."""
        return [] if self.holds_out else list_sources(self.validation)

    @property
    def is_plain_text(self) -> bool:
        """Whether the training rows have no input and no target."""
        return any(source.lower().endswith(".txt") for source in self.train_sources)

    @model_validator(mode="after")
    def check_tasks(self) -> "DataConfig":
        if self.tasks is not None and not self.tasks:
            raise ValueError("data.tasks is empty: name the tasks, or leave it out")
        if self.task is not None and not self.tasks:
            raise ValueError("data.task needs data.tasks, the values that the column can take")
        if self.tasks and self.task is None and not isinstance(self.tasks, dict):
            raise ValueError("data.tasks needs data.task, the column that names a row's task")
        return self


class TrainConfig(Section):
    """The optimization."""

    max_steps: Positive = 1000
    """The number of optimizer steps."""

    epochs: Annotated[Real, Field(gt=0, le=1e6)] | None = None
    """How often every training row is read, in place of `max_steps`: the steps follow from the number of rows when the
    run begins, and its config.yaml has them. A fraction is possible."""

    batch_size: Annotated[Positive, at_most(10_000_000)] = 32
    """Examples per optimizer step, over all ranks."""

    micro_batch_tokens: Annotated[Positive | Literal["auto"], BeforeValidator(refuse_text_but_auto)] = 8192
    """The most positions that a rank processes at a time: the knob for memory. The loss curve does not depend on it.
    `auto`: as many as fit in memory; where they do not after all, half as many."""

    objective: str = "cross_entropy"
    """How the loss is made from the outputs at the target. `cross_entropy`: the tokens or the class of the target.
    `mse`: a number."""

    label_smoothing: Share = 0.0
    """The share of the probability that `cross_entropy` spreads over all tokens, or all classes."""

    standardize_targets: bool = True
    """With numbers as targets: learn them as (number - mean) / standard deviation of the training set. Answers and
    metrics are in the original unit either way."""

    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """The optimizer of the prompt."""

    learning_rate: Annotated[Real, Field(gt=0, le=1e30)] | None = None  # above, a step leaves float32
    """The highest learning rate of the schedule. Where left out, that of the method on this family of bases: see
    docs/methods.md."""

    weight_decay: Annotated[Real, Field(ge=0, le=1e6)] = 0.0
    """Decoupled weight decay."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's moments."""

    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """AdamW's term for numerical stability."""

    momentum: Share = 0.0
    """SGD's momentum."""

    schedule: Schedule = "linear"
    """The learning rate after warm-up: constant, or falling to zero at `max_steps`. The other names are those of
    transformers' `get_scheduler`, with its curves after the warm-up."""

    schedule_options: dict[str, Any] = {}
    """Options of transformers' schedules, by its names: `{num_cycles: 3}`, `{power: 2.0}`, `{min_lr_rate: 0.1}`."""

    warmup_steps: NotNegative | None = None
    """Steps over which the learning rate rises from zero. Where left out, the method's share of `max_steps`, which is 0
    for prompts."""

    warmup_type: Literal["linear", "log"] = "linear"
    """How it rises: `linear`, or `log`, which is DeepSpeed's default: fast at first."""

    min_lr_ratio: Share = 0.0
    """Where the cosine ends, as a share of `learning_rate`."""

    max_grad_norm: Annotated[Real, Field(ge=0)] = 1.0
    """The gradient is scaled down to this norm; 0: no clipping."""

    context_cache_gib: Annotated[Real, Field(ge=0)] = 0.0
    """Memory of each rank for the keys and values of contexts, and for what the layers below late prompts leave of
    rows, kept across steps and epochs."""

    context_cache_gpu_gib: Annotated[Real, Field(ge=0)] = 0.0
    """Memory of each GPU for contexts, filled before `context_cache_gib`. Without a GPU it is not used."""

    context_cache_dir: OptionalFolder = None
    """A folder for the contexts that memory does not hold."""

    log_every: Positive | None = None
    """Steps between lines of a run's log: of metrics.jsonl, TensorBoard and the console; the first and the last step
    have one too. Where left out, every step has one, but for the console, which has one every few seconds."""

    average_last: NotNegative = 0
    """At the end, the mean of the last so many checkpoints' prompts is evaluated too, and kept where it is the best."""

    report_to: Annotated[list[Tracker], AfterValidator(refuse_twice)] = []
    """Services that also get the metrics, through accelerate's trackers, each of which must be installed. TensorBoard's
    files are always written."""

    resume: Literal["auto", "never"] = "auto"
    """Whether the same command on an existing run resumes it or refuses."""

    hang_timeout_s: Annotated[Real, Field(ge=0)] = 600.0
    """A rank that makes no progress for so long ends the job; 0: never."""

    @model_validator(mode="before")
    @classmethod
    def leave_steps_open(cls, raw: Any) -> Any:
        """With `epochs`, `max_steps` is not known before the rows are counted."""
        if not isinstance(raw, dict) or raw.get("epochs") is None:
            return raw
        if raw.get("max_steps") not in (None, UNKNOWN_STEPS):
            raise ValueError("train.epochs and train.max_steps are both given: leave one out, or give it as null")
        return {**raw, "max_steps": UNKNOWN_STEPS}

    @model_validator(mode="after")
    def check_schedule_options(self) -> "TrainConfig":
        if self.schedule_options and self.schedule in OWN_SCHEDULES:
            raise ValueError(f"train.schedule_options is given, but schedule {self.schedule} has none: leave it out")
        return self

    @property
    def peak_rate(self) -> float:
        """`learning_rate` as a number, once the method's default is filled in."""
        assert self.learning_rate is not None, "the reading has settled it"
        return self.learning_rate

    @property
    def num_warmup_steps(self) -> int:
        """`warmup_steps` as a number, once the method's default is filled in."""
        assert self.warmup_steps is not None, "the reading has settled it"
        return self.warmup_steps

    @property
    def most_positions(self) -> int:
        """`micro_batch_tokens` as a number: that of `auto` is known once the base is, and the default until then."""
        return 8192 if self.micro_batch_tokens == "auto" else self.micro_batch_tokens


class Repeated(Section):
    """What is done again and again as a run trains."""

    every: Interval = 0
    """Steps between two times, `epoch` or a share of all steps; 0: never."""

    @property
    def every_steps(self) -> int:
        """`every` in steps, once the rows are counted."""
        assert isinstance(self.every, int), "the run's length is settled"
        return self.every


class EvaluateConfig(Repeated):
    """Evaluations on the validation rows during training."""

    every: Interval = 200
    """Steps between evaluations; `epoch`: an evaluation after each epoch; below 1: a share of all steps; 0: only before
    and after training."""

    metrics: Annotated[list[Metric], AfterValidator(refuse_twice)] = ["loss"]
    """What is computed. The loss is always among the results."""

    best_metric: Metric | None = None
    """The metric by which the best prompt is kept; the first of `metrics` where left out."""

    patience: NotNegative = 0
    """Stop after this many evaluations without a better one; 0: never."""

    max_examples: NotNegative = 0
    """Evaluate on the first so many rows; 0: on all."""

    max_new_tokens: Positive | None = None
    """The most tokens of a generated answer. Where left out: the longest target of the rows, or 32 for answers that are
    only shown and after plain text."""

    num_samples: NotNegative = 5
    """Generated answers shown at each evaluation."""

    @property
    def best(self) -> str:
        return self.best_metric or (self.metrics[0] if self.metrics else "loss")


class CheckpointConfig(Repeated):
    """Checkpoints, from which a run resumes."""

    every: Interval = 100
    """Steps between checkpoints, `epoch` or a share of all steps; 0: only at the end."""

    keep: Positive = 2
    """How many checkpoints are kept."""


class HalvingConfig(Section):
    """Successive halving of a sweep (Jamieson and Talwalkar, 2016): the members that are worse on validation stop."""

    every: Positive
    """Steps between two selections."""

    keep: Annotated[Real, Field(gt=0, lt=1)]
    """The share of the members that continue."""


class Config(Section):
    """One run."""

    output_dir: PathText
    """The run's folder, relative to the current folder."""

    seed: Annotated[NotNegative, Field(lt=2**32)] = 0
    """Decides the order of examples and the initial prompt. Results do not depend on the number of ranks."""

    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    deepspeed: PathText | dict[str, Any] | None = None
    """A DeepSpeed JSON file, its content, or the name of one that comes with the package, such as `zero3_bf16`. Its
    `auto` values are filled from this config. ZeRO stage 0 where left out."""

    sweep: Sweep | None = None
    """Prompts that are trained together. `{key: [values]}`: each combination is a member; `[{key: value}, ...]`: each
    mapping is one."""

    sweep_halving: HalvingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def fill_what_members_give(cls, raw: Any) -> Any:
        return fill_from_members(raw)

    @model_validator(mode="after")
    def check_across_sections(self) -> "Config":
        is_text = self.data.is_plain_text
        if not is_text and self.data.messages is None and (self.data.template is None or self.data.target is None):
            raise ValueError("data.template and data.target are needed unless data.train is a .txt file")
        needs = {METRICS[name].needs: name for name in reversed(self.evaluate.metrics)}
        if is_text and set(needs) - {"losses"}:
            raise ValueError("evaluate.metrics: a .txt file has no targets to match, use loss and perplexity")
        if "label_losses" in needs and not self.data.labels:
            name = needs["label_losses"]
            raise ValueError(f"evaluate.metrics: {name} needs data.labels, the values that the target can take")
        if self.evaluate.best_metric and self.evaluate.best_metric not in ("loss", *self.evaluate.metrics):
            raise ValueError(f"evaluate.best_metric: {self.evaluate.best_metric} is not among evaluate.metrics")
        if self.prompt.init == "labels" and not (self.prompt.init_labels or self.data.labels):
            raise ValueError("prompt.init: labels needs prompt.init_labels or data.labels")
        if self.evaluate.patience and not (self.evaluate.every and self.data.validation):
            raise ValueError("evaluate.patience needs data.validation and evaluate.every above 0")
        if (self.train.warmup_steps or 0) >= self.train.max_steps:
            raise ValueError("train.warmup_steps must be less than train.max_steps")
        self.check_average()
        if self.train.min_lr_ratio and self.train.schedule != "cosine":
            raise ValueError(f"train.min_lr_ratio is for schedule cosine, and train.schedule is {self.train.schedule}")
        if self.sweep_halving and not self.sweep:
            raise ValueError("sweep_halving needs sweep, the members of which it keeps some")
        return self

    def check_average(self) -> None:
        """Raises ValueError where there will be nothing to average, or nothing that says whether it is better."""
        count = self.train.average_last
        if not count:
            return
        if count == 1:
            raise ValueError("train.average_last: 1 checkpoint is no mean: give 2 or more, or leave it out")
        if not self.data.validation:
            raise ValueError("train.average_last needs data.validation, by which the mean is kept or not")
        if self.checkpoint.every == 0 or self.checkpoint.keep < count:
            raise ValueError(f"train.average_last: {count} needs checkpoint.every above 0 and checkpoint.keep={count}")

    @model_validator(mode="after")
    def check_placement(self) -> "Config":
        placement = self.prompt.placement
        if placement != "prefix" and self.data.is_plain_text:
            raise ValueError(f"prompt.placement: {placement} needs an input and a .txt file has none, use prefix")
        found = len(PROMPT_MARKER.findall(self.data.template or ""))
        if placement == "template" and found != 1:
            raise ValueError(f"prompt.placement: template needs {{{{ prompt }}}} once in data.template, found {found}")
        return self
