"""The peer of a benchmark: PEFT's prompt or prefix tuning under the Hugging Face Trainer, with our side's config.

    torchrun --nproc-per-node 2 -m ptune_dist.bench.peft_trainer CONFIG [KEY=VALUE ...] --micro-batch-size N --result F

Base, rows, tokens, the prompt's start, batch per step, AdamW, schedule, clipping and the DeepSpeed JSON come from the
config; evaluation and checkpoints are off. The Trainer groups rows by length in its own way. The size of a micro-batch
(rows per rank) and the interval of logged losses are settings of the peer.
"""

import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import torch.distributed as dist  # noqa: E402
from peft import PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, TaskType, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ptune_dist.base.load import fill_whole  # noqa: E402
from ptune_dist.base.source import load_shape, load_tokenizer  # noqa: E402
from ptune_dist.bench.arguments import side_parser  # noqa: E402
from ptune_dist.bench.probe import NUM_WARM_UP_STEPS, Probe, steady_figures, write_result  # noqa: E402
from ptune_dist.bench.work import share_of_peak, useful_flops  # noqa: E402
from ptune_dist.cluster.processes import leave  # noqa: E402
from ptune_dist.config.load import load_config  # noqa: E402
from ptune_dist.config.schema import Config  # noqa: E402
from ptune_dist.data.build import build_split  # noqa: E402
from ptune_dist.data.examples import Examples  # noqa: E402
from ptune_dist.errors import UserError  # noqa: E402
from ptune_dist.families.find import open_any  # noqa: E402
from ptune_dist.prompts.build import build_prompt  # noqa: E402
from ptune_dist.run.parts import base_facts  # noqa: E402
from ptune_dist.run.reading import build_reading  # noqa: E402

IGNORED = -100  # the label of tokens that transformers leaves out of the loss
# method -> PEFT's configuration of the same parameters; its other methods, and options of ours, are not compared
PEERS: dict[str, type[PromptLearningConfig]] = {
    "prompt_tuning": PromptTuningConfig,
    "prefix_tuning": PrefixTuningConfig,
}
WIDTHS = ("token_dim", "num_attention_heads", "num_layers")  # settings of prefix tuning that follow from the base


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The base under PEFT with our prompt's start. Call it before making TrainingArguments: DeepSpeed shards later.

    Raises UserError for a prompt that PEFT does not train in the same way.
    """
    prompt_config = config.prompt
    if prompt_config.method not in PEERS or prompt_config.model_extra:
        raise UserError(f"prompt.method: the peer supports {' and '.join(PEERS)} without further options")
    opened = open_any(
        config.model.path,
        dtype=getattr(torch, config.model.dtype),
        random_init=config.model.random_init,
        seed=config.seed,
    )
    base = fill_whole(opened)

    def lookup(ids: list[int]) -> torch.Tensor:
        return base.get_input_embeddings()(torch.tensor(ids)).float()

    prompt = build_prompt(config, base_facts(base), tokenizer, lookup, with_start=True)
    if prompt.start_tokens:
        raise UserError("prompt.init: the peer does not start from what the base computes of a text: use random")
    adapter = prompt.to_peft(prompt.plain())
    assert adapter.prompt_embeddings is not None, "both methods store them"
    facts = {name: adapter.settings[name] for name in WIDTHS if name in adapter.settings}
    peer = PEERS[prompt_config.method](
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=prompt_config.num_virtual_tokens, **facts
    )
    model = get_peft_model(base, peer)
    encoder = cast(nn.ModuleDict, model.prompt_encoder)["default"]
    encoder.get_parameter("embedding.weight").data.copy_(adapter.prompt_embeddings)
    return model


def build_arguments(config: Config, *, micro_batch_size: int, log_steps: int, world_size: int) -> TrainingArguments:
    """The config as arguments of the Trainer. Raises UserError for what the peer does not support."""
    train = config.train
    accumulation, rest = divmod(train.batch_size, micro_batch_size * world_size)
    if rest:
        raise UserError(
            f"--micro-batch-size: {micro_batch_size} rows on {world_size} ranks do not divide a batch of "
            f"{train.batch_size}"
        )
    if train.optimizer != "adamw":
        raise UserError(f"train.optimizer: the peer supports adamw, not {train.optimizer}")
    for key in ("warmup_type", "min_lr_ratio"):
        if getattr(train, key) != type(train).model_fields[key].default:
            raise UserError(f"train.{key}: the peer supports only the default")
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=train.max_steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="group_by_length",
        learning_rate=train.peak_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_epsilon=train.eps,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.num_warmup_steps,
        bf16=config.model.dtype == "bfloat16",
        fp16=config.model.dtype == "float16",
        deepspeed=config.deepspeed,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="nccl" if torch.cuda.is_available() else "gloo",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=config.seed,
        logging_steps=log_steps,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
    )


def build_rows(examples: Examples) -> list[dict[str, list[int]]]:
    """Our token ids, with labels at the target only."""
    rows = []
    for i in range(len(examples)):
        text = examples.input_ids(i).tolist()
        target = examples.target_ids(i).tolist()
        rows.append({"input_ids": text + target, "labels": [IGNORED] * len(text) + target})
    return rows


def collate(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right to the longest."""
    width = max(len(row["input_ids"]) for row in rows)

    def stack(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": stack("input_ids", pad_id), "attention_mask": mask, "labels": stack("labels", IGNORED)}


@dataclass
class Count:
    """This rank's rows and tokens, without padding, in every optimizer step."""

    rows: list[int]
    tokens: list[int]

    def begin_step(self) -> None:
        self.rows.append(0)
        self.tokens.append(0)

    def add(self, attention_mask: torch.Tensor) -> None:
        self.rows[-1] += len(attention_mask)
        self.tokens[-1] += int(attention_mask.sum())

    def over_ranks(self) -> tuple[list[int], list[int]]:
        """Sums over ranks. Collective."""
        table = torch.tensor([self.rows, self.tokens], device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(table)
        rows, tokens = table.tolist()
        return rows, tokens


class Watch(TrainerCallback):
    """Tells the probe and the count when the Trainer begins training, and begins or ends a step."""

    def __init__(self, probe: Probe, count: Count):
        self.probe = probe
        self.count = count

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.probe.base_loaded()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.count.begin_step()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.probe.step_done()


class CountingTrainer(Trainer):
    """A Trainer that counts what reaches the model, without what the data loader has read ahead."""

    def __init__(self, count: Count, **options: Any):
        super().__init__(**options)
        self._count = count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._count.add(inputs["attention_mask"])
        return super().training_step(model, inputs, *args, **kwargs)


def build_result(trainer: Trainer, probe: Probe, count: Count) -> dict:
    """The side's figures. Collective: every rank must call."""
    is_timed = len(count.rows) > NUM_WARM_UP_STEPS
    window_s, cpu_s = probe.window() if is_timed else (0.0, 0.0)
    gathered: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, (probe.memory(), cpu_s))
    memory = {name: max(found[name] for found, _ in gathered) for name in gathered[0][0]}
    rows, tokens = count.over_ranks()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = {"steps": len(rows), "world_size": len(gathered), **memory, "loss_curve": losses}
    if is_timed:
        result |= steady_figures(window_s, sum(cpu for _, cpu in gathered), rows, tokens)
    return result


def run_peer(config: Config, *, micro_batch_size: int, log_steps: int) -> dict:
    """Train and return the figures. Collective: every rank must call. Raises UserError."""
    # DeepSpeed calls deprecated names, with thousands of warnings per run; our side silences them too.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..* is deprecated")
    tokenizer = load_tokenizer(config.model.path, load_shape(config.model.path))
    reading = build_reading(config)
    split = build_split(config.data, reading.encoding(config), which="train")
    assert split is not None, "data.train is required"
    model = build_model(config, tokenizer)
    arguments = build_arguments(
        reading.config,
        micro_batch_size=micro_batch_size,
        log_steps=log_steps or config.train.max_steps,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )
    probe = Probe()
    count = Count([], [])
    pad_id = cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    trainer = CountingTrainer(
        count,
        model=model,
        args=arguments,
        train_dataset=cast(Dataset, build_rows(split.examples)),  # any sequence will do
        data_collator=lambda rows: collate(rows, pad_id),
        callbacks=[Watch(probe, count)],
    )
    trainer.train()
    result = build_result(trainer, probe, count)
    if "samples_per_s" in result:
        base = cast(PreTrainedModel, model.base_model)
        result |= count_work(base, split.examples, config.prompt.num_virtual_tokens, result["tokens_per_s"])
    return result


def count_work(base: PreTrainedModel, examples: Examples, num_virtual: int, tokens_per_s: float) -> dict[str, float]:
    """Useful work per second, and its share of the rate of plain matrix products. Collective: every rank must call."""
    flops = useful_flops(
        base, examples.lengths.tolist(), examples.num_targets.tolist(), num_virtual=num_virtual, recomputes=False
    )
    return share_of_peak(base, flops / int(examples.lengths.sum()) * tokens_per_s)


def main() -> int:
    parser = side_parser(__doc__)
    parser.add_argument("--micro-batch-size", type=int, required=True, help="rows that one rank processes at a time")
    parser.add_argument("--log-steps", type=int, default=0, help="steps between logged losses; 0: only the last")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides)
        result = run_peer(config, micro_batch_size=args.micro_batch_size, log_steps=args.log_steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if dist.get_rank() == 0:
        write_result(args.result, result | {"micro_batch_size": args.micro_batch_size})
    dist.destroy_process_group()  # without this, gloo's threads may abort the process at exit
    return 0


if __name__ == "__main__":
    leave(main())
