"""The config: every key with its type, default and meaning, and the checks that span several keys.

The string under a key is its description: `docs/configuration.md` is generated from these. No torch is imported here,
so that a login node reads a config in a fraction of a second.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ptune_dist.config.data_section import DataConfig
from ptune_dist.config.fields import (
    MOST,
    NotNegative,
    OptionalFolder,
    PathText,
    Positive,
    Real,
    Section,
    Share,
    at_most,
    refuse_text_but_auto,
    refuse_twice,
)
from ptune_dist.config.prompt_text import JINJA
from ptune_dist.config.repeated import CheckpointConfig, EvaluateConfig, HalvingConfig
from ptune_dist.config.sections import ModelConfig, PromptConfig
from ptune_dist.config.sweep import check_sweep, fill_from_members
from ptune_dist.metrics import METRICS

Sweep = Annotated[dict[str, list[Any]] | list[dict[str, Any]], BeforeValidator(check_sweep)]
UNKNOWN_STEPS = MOST  # `max_steps` until the rows are counted
# Of `train`: without `train.nodes: replicas` they would do nothing.
REPLICA_KEYS = (
    "sync_every",
    "min_nodes",
    "max_nodes",
    "num_blocks",
    "num_workers",
    "outer_lr",
    "outer_momentum",
    "stall_timeout_s",
)
MOST_BLOCKS = 4096
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
    """The highest learning rate of the schedule. Where left out, that of the method on this family of bases, which is
    for `adamw`: see docs/methods.md. Other optimizers need one."""

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

    nodes: Literal["one_world", "replicas", "auto"] = "one_world"
    """`one_world`: the ranks of all nodes share one copy of the base. `replicas`: each node holds the base and trains
    in a world of its own, and nodes exchange the prompts' gradients: a node may be lost, leave or join at any step.
    `auto`: `replicas` where each node is a world of its own."""

    min_nodes: Positive = 1
    """With `replicas`: training waits while there are fewer nodes."""

    max_nodes: Positive | None = None
    """With `replicas`: further nodes wait until one of these has left."""

    num_blocks: Annotated[Positive | Literal["auto"], BeforeValidator(refuse_text_but_auto)] = "auto"
    """With `replicas`: into how many blocks the rows of a step are cut, a power of two. A block is computed by one rank
    of one node, so there should be as many as ranks at least. The loss curve is bitwise the same for one number of
    blocks, whatever nodes there are. `auto` is kept in the run's folder."""

    sync_every: Positive = 1
    """With `replicas`: steps between two exchanges of nodes, for slow links. Above 1, each of `num_workers` workers
    takes so many steps of its own, with its part of each step's rows; all continue from the mean of their prompts and
    optimizer states (DiLoCo, Douillard et al. 2023). Evaluations, checkpoints and stops wait for an exchange."""

    num_workers: Annotated[Positive | Literal["auto"], BeforeValidator(refuse_text_but_auto)] = "auto"
    """With `sync_every` above 1: how many workers there are, a power of two. Nodes share them, so that the result does
    not depend on the number of nodes. `auto`: one for each node that is expected, kept in the run's folder."""

    outer_lr: Annotated[Real, Field(gt=0, le=10)] = 1.0
    """With `sync_every` above 1: how far prompts move towards the workers' mean at an exchange, 0.7 in the paper; 1
    without `outer_momentum`: to the mean itself."""

    outer_momentum: Share = 0.0
    """With `sync_every` above 1: Nesterov momentum of that move, 0.9 in the paper."""

    stall_timeout_s: Annotated[Real, Field(gt=0)] = 10.0
    """With `replicas`: a node that takes so much longer than twice the last step is left behind by the others; it
    comes back when it has recovered."""

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

    @model_validator(mode="after")
    def check_nodes(self) -> "TrainConfig":
        if self.nodes == "one_world":
            for key in REPLICA_KEYS:
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"train.{key}: {getattr(self, key)} needs train.nodes: replicas")
        if self.max_nodes is not None and self.max_nodes < self.min_nodes:
            raise ValueError(f"train.max_nodes is {self.max_nodes}, less than train.min_nodes, {self.min_nodes}")
        if self.num_blocks != "auto" and (self.num_blocks & (self.num_blocks - 1) or self.num_blocks > MOST_BLOCKS):
            raise ValueError(f"train.num_blocks: a power of two up to {MOST_BLOCKS:,} is needed, not {self.num_blocks}")
        return self

    @model_validator(mode="after")
    def check_local_steps(self) -> "TrainConfig":
        if self.num_workers == "auto":
            return self
        if self.num_workers & (self.num_workers - 1):
            raise ValueError(f"train.num_workers: a power of two is needed, not {self.num_workers}")
        if self.num_workers > self.batch_size:
            raise ValueError(
                f"train.num_workers: {self.num_workers} workers are more than the rows of a step, "
                f"train.batch_size {self.batch_size}"
            )
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
        if self.train.num_blocks != "auto" and self.train.num_blocks > self.train.batch_size and not self.sweep:
            raise ValueError(
                f"train.num_blocks: {self.train.num_blocks} blocks are more than the rows of a step, "
                f"train.batch_size {self.train.batch_size}"
            )
        if self.train.sync_every > 1 and self.model.dtype == "float16":
            raise ValueError(
                f"train.sync_every: {self.train.sync_every} does not go with model.dtype float16, whose loss scale "
                "follows from every step of all rows: use bfloat16"
            )
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
    def check_text(self) -> "Config":
        text = self.prompt.text
        if text is None:
            return self
        if self.data.is_plain_text:
            raise ValueError("prompt.text stands around an input, and a .txt file has none: leave it out")
        if self.data.messages is not None:
            if text.has_place():
                raise ValueError("prompt.text: data.messages has no template that {{ template }} could stand for")
            if any(JINJA.search(part) for part in text.parts().values()):
                raise ValueError("prompt.text: with data.messages it is a system prompt, which has no columns")
        return self

    @model_validator(mode="after")
    def check_placement(self) -> "Config":
        placement = self.prompt.placement
        if placement != "prefix" and self.data.is_plain_text:
            raise ValueError(f"prompt.placement: {placement} needs an input and a .txt file has none, use prefix")
        found = len(PROMPT_MARKER.findall(self.data.template or ""))
        if placement == "template" and found != 1:
            raise ValueError(f"prompt.placement: template needs {{{{ prompt }}}} once in data.template, found {found}")
        return self
