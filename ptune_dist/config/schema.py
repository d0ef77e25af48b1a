"""The sections of the config: every key with its type, default and meaning, and the checks that span several keys.

The string under a key is its description: `docs/configuration.md` is generated from these. No torch is imported here,
so that a login node reads a config in a fraction of a second.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ptune_dist.config.sweep import check_sweep, fill_from_members
from ptune_dist.metrics import METRICS


def refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # YAML's yes and true are 1 to pydantic
        raise ValueError("a number is needed")
    return value


def refuse_text_but_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto" and not value.isdecimal():
        raise ValueError("a number or auto is needed")
    return value


def refuse_twice(labels: list[str]) -> list[str]:
    for number, label in enumerate(labels):
        if label in labels[:number]:
            raise ValueError(f"{label!r} is listed twice")
    return labels


def check_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric, use one of {', '.join(METRICS)}")
    return name


Positive = Annotated[int, BeforeValidator(refuse_bool), Field(gt=0)]
NotNegative = Annotated[int, BeforeValidator(refuse_bool), Field(ge=0)]
Real = Annotated[float, BeforeValidator(refuse_bool), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, lt=1)]
# YAML reads a bare `off` as false.
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
Label = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value)]
Metric = Annotated[str, AfterValidator(check_metric)]
Sweep = Annotated[dict[str, list[Any]] | list[dict[str, Any]], BeforeValidator(check_sweep)]
PLACEMENTS_WITH_CONTEXTS = ("infix", "template", "decoder")  # tokens stand before the prompt, and depend on none
PROMPT_MARKER = re.compile(r"\{\{-?\s*prompt\s*-?\}\}")  # in data.template, for placement template


class Section(BaseModel):
    """Part of the config: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The frozen base model."""

    path: str
    """A local folder or a name on the Hugging Face hub: a transformers model in safetensors files."""

    family: str = "auto"
    """How the base reads an example; `auto` takes it from the base's own config."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of the computation. DeepSpeed's `bf16` and `fp16` sections follow it; `float16` needs a GPU."""

    quantization: Literal["none", "int8", "fp8"] = "none"
    """`int8` and `fp8` store the weights of the frozen linear layers in 8 bits. `fp8` multiplies in 8 bits too, forward
    and back, which is faster and coarser: on GPUs of compute capability 8.9 or newer, emulated on a CPU."""

    int8_include: list[Literal["head", "embeddings"]] = []
    """Also stored in int8: the output head, the token embeddings."""

    int8_activations: bool = False
    """Multiply in int8 too, as LLM.int8() does: faster on some devices, coarser on all of them."""

    int8_threshold: Annotated[Real, Field(ge=0)] = 6.0
    """With `int8_activations`: input columns with an entry beyond it stay in floating point."""

    compile: AutoOrOff = "auto"
    """`auto` compiles norms, rotary embeddings and gated activations to fused kernels on a GPU; what cannot be compiled
    runs one operation at a time, after a line that says why. `off` compiles none."""

    check: bool = True
    """Before training, compare two short rows in our pass with the base's own forward: a base whose architecture needs
    more than it is given is refused. `false` trains on it as it is."""

    random_init: bool = False
    """Build the base from its shape with random weights, for benchmarks without a download."""

    @model_validator(mode="after")
    def check_int8(self) -> "ModelConfig":
        for key, formats in {"int8_include": ["int8", "fp8"], "int8_activations": ["int8"]}.items():
            if getattr(self, key) and self.quantization not in formats:
                found = f"model.{key} is given but model.quantization is {self.quantization}"
                raise ValueError(f"{found}: set it to {' or '.join(formats)}")
        return self


class PromptConfig(Section):
    """The soft prompt: how it is parameterized, where it is placed and how it starts.

    The options of a method are keys of this section too. They are kept as they are given: which of them a method has
    is checked by the `resolve` of `load_config`.
    """

    model_config = ConfigDict(extra="allow")

    method: str = "prompt_tuning"
    """How the prompt is parameterized. Some methods have options of their own, which are listed with the method."""

    num_virtual_tokens: Positive = 20
    """The length of the prompt in positions."""

    placement: Literal["prefix", "infix", "template", "encoder", "decoder"] = "prefix"
    """Where the virtual tokens stand. `prefix`: before the input. `infix`: between input and target. `template`: where
    `{{ prompt }}` stands in `data.template`. `encoder`, `decoder`: before what that half of a seq2seq base reads."""

    init: Literal["random", "vocab", "text", "labels", "file"] | None = None
    """What the prompt starts from; where left out, what suits the method. `random`: random numbers. `vocab`: embeddings
    of random tokens. `text`, `labels`: embeddings of a text or of the labels. `file`: an earlier prompt."""

    init_text: str | None = None
    """The text to start from, with `init: text`."""

    init_labels: list[Label] | None = None
    """The labels to start from, with `init: labels`; `data.labels` where left out."""

    init_file: str | None = None
    """The run, prompt folder or PEFT adapter to start from, with `init: file`."""

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


class CsvConfig(Section):
    """How .csv and .tsv files are written, where it is not as usual for their extension."""

    delimiter: str | None = None
    """The character between fields: `,` in .csv and a tab in .tsv where left out."""

    quoting: Literal["minimal", "all", "none"] | None = None
    """`minimal`, `all`: a field may stand in quotes, which are removed. `none`: quotes are plain characters. Where left
    out, `minimal` in .csv and `none` in .tsv, and quotes that look otherwise are an error."""

    quotechar: str = '"'
    """The quote."""

    escapechar: str | None = None
    """A character that makes the next one plain, such as a backslash."""

    doublequote: bool = True
    """Whether two quotes inside a quoted field are one."""

    encoding: str | None = None
    """The encoding, such as `latin-1`, `cp1252` or `utf-16`: UTF-8 where left out."""

    header: bool | list[str] | None = None
    """The columns' names, where the first line is a row already. `true`: the first line is the header even if it looks
    like a row."""

    @model_validator(mode="after")
    def check_characters(self) -> "CsvConfig":
        for name in ("delimiter", "quotechar", "escapechar"):
            value = getattr(self, name)
            if value is not None and (len(value) != 1 or value in "\r\n"):
                raise ValueError(f"data.csv.{name}: one character is needed, not {value!r}")
        if self.delimiter == self.quotechar and self.quoting != "none":
            raise ValueError(f"data.csv.delimiter and data.csv.quotechar are both {self.delimiter!r}")
        if self.header is False or self.header == []:
            raise ValueError("data.csv.header: name the columns in a list, or leave it out")
        try:
            b"".decode(self.encoding or "utf-8")
        except LookupError:
            raise ValueError(f"data.csv.encoding: Python knows no text encoding {self.encoding!r}") from None
        return self


class DataConfig(Section):
    """The examples, and how a row becomes an input and a target."""

    train: str
    """The training rows: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, a folder saved by `datasets`, or a dataset
    on the hub (`NAME`, `NAME@CONFIG`, `NAME:SPLIT`)."""

    validation: str | None = None
    """The validation rows, in the same forms."""

    csv: CsvConfig = CsvConfig()
    """How .csv and .tsv files are written."""

    template: str | None = None
    """The input: jinja2 over the columns of a row. Needed unless the data is a .txt file."""

    target: str | None = None
    """The expected output: jinja2 over the columns of a row. The loss is computed only here."""

    references: str | None = None
    """A column with the acceptable answers of a validation row, a text or a list of texts, for the metrics that compare
    generated answers: the best one counts. `answers.text` is what `text` holds inside column `answers`. The target
    where left out."""

    labels: Annotated[list[Label], AfterValidator(refuse_twice)] | None = None
    """The values that the target's one column can take: for accuracy by likelihood, for `init: labels`, and as the
    classes of an encoder base."""

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

    cache_dir: str | None = "auto"
    """The folder in which token ids of large data are kept for all ranks and for restarts. `auto`: below the user's
    cache folder. `null`: every rank reads all rows at every start."""

    cache_gib: Annotated[Real, Field(gt=0)] = 64.0
    """The most that `cache_dir` keeps. What was not used for the longest time is removed first."""


class TrainConfig(Section):
    """The optimization."""

    max_steps: Positive = 1000
    """The number of optimizer steps."""

    batch_size: Positive = 32
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

    learning_rate: Annotated[Real, Field(gt=0, le=1e30)] = 0.3  # above, a step leaves float32
    """The highest learning rate of the schedule."""

    weight_decay: Annotated[Real, Field(ge=0, le=1e6)] = 0.0
    """Decoupled weight decay."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's moments."""

    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """AdamW's term for numerical stability."""

    momentum: Share = 0.0
    """SGD's momentum."""

    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """The learning rate after warm-up: constant, or falling to zero at `max_steps`."""

    warmup_steps: NotNegative = 0
    """Steps over which the learning rate rises linearly from zero."""

    max_grad_norm: Annotated[Real, Field(ge=0)] = 1.0
    """The gradient is scaled down to this norm; 0: no clipping."""

    context_cache_gib: Annotated[Real, Field(ge=0)] = 0.0
    """Memory of each rank for the keys and values of contexts, kept across steps and epochs."""

    context_cache_gpu_gib: Annotated[Real, Field(ge=0)] = 0.0
    """Memory of each GPU for contexts, filled before `context_cache_gib`. Without a GPU it is not used."""

    context_cache_dir: str | None = None
    """A folder for the contexts that memory does not hold."""

    resume: Literal["auto", "never"] = "auto"
    """Whether the same command on an existing run resumes it or refuses."""

    hang_timeout_s: Annotated[Real, Field(ge=0)] = 600.0
    """A rank that makes no progress for so long ends the job; 0: never."""

    @property
    def most_positions(self) -> int:
        """`micro_batch_tokens` as a number: that of `auto` is known once the base is, and the default until then."""
        return 8192 if self.micro_batch_tokens == "auto" else self.micro_batch_tokens


class EvaluateConfig(Section):
    """Evaluations on the validation rows during training."""

    every: NotNegative = 200
    """Steps between evaluations; 0: only before and after training."""

    metrics: list[Metric] = ["loss"]
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


class CheckpointConfig(Section):
    """Checkpoints, from which a run resumes."""

    every: NotNegative = 100
    """Steps between checkpoints; 0: only at the end."""

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

    output_dir: str
    """The run's folder, relative to the current folder."""

    seed: Annotated[NotNegative, Field(lt=2**32)] = 0
    """Decides the order of examples and the initial prompt. Results do not depend on the number of ranks."""

    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    deepspeed: str | dict[str, Any] | None = None
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
        is_text = self.data.train.lower().endswith(".txt")
        if not is_text and (self.data.template is None or self.data.target is None):
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
        for key in ("context_cache_gib", "context_cache_gpu_gib", "context_cache_dir"):
            if getattr(self.train, key) and placement not in PLACEMENTS_WITH_CONTEXTS:
                raise ValueError(
                    f"train.{key} is given but placement {placement} has no contexts to keep: "
                    f"leave it out, or set prompt.placement to one of {', '.join(PLACEMENTS_WITH_CONTEXTS)}"
                )
        return self
