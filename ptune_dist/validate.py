"""`validate`: what a config will do, before anything is trained. Reads data and the base's shape, not its weights.

Floor 6.
"""

import json

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ptune_dist.base.layers import embedding_width
from ptune_dist.base.load import check_is_causal, load_shape, load_tokenizer
from ptune_dist.config import Config, render_config
from ptune_dist.data.build import Split, build_split
from ptune_dist.data.encode import token_statistics
from ptune_dist.evaluate import build_judge
from ptune_dist.job import build_deepspeed_json, check_positions, check_precision
from ptune_dist.prompts.initialise import build_initial_vectors
from ptune_dist.run_dir import check_run_dir

NUM_EXAMPLES = 5


def validate(config: Config) -> None:
    """Print the resolved config, token statistics and five examples. Raises UserError for whatever is wrong."""
    console = Console(highlight=False, soft_wrap=True)
    shape = load_shape(config.model.path)
    check_is_causal(shape, config.model.path)
    tokenizer = load_tokenizer(config.model.path, shape)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape)
    check_run_dir(config)
    check_precision(config)
    check_positions(config, base)
    content = build_deepspeed_json(config, base)
    width = embedding_width(base)
    build_initial_vectors(
        config.prompt, config.data, seed=config.seed, width=width, tokenizer=tokenizer,
        lookup=lambda ids: torch.zeros(len(ids), width),
    )  # fmt: skip
    splits = {which: build_split(config.data, tokenizer, which=which) for which in ("train", "validation")}
    if splits["validation"]:
        build_judge(config, splits["validation"], tokenizer)

    console.rule("config")
    console.print(render_config(config), markup=False)
    console.rule("DeepSpeed's JSON, filled in")
    console.print(json.dumps(content, indent=2), markup=False)
    console.rule("tokens")
    console.print(render_statistics(splits))
    size = f"{sum(p.numel() for p in base.parameters()):,} parameters"
    console.print(f"base: {shape.model_type}, {size}; {describe_epochs(config, splits['train'])}")
    console.rule(Text("examples, the supervised part in [brackets]"))
    for index in range(min(NUM_EXAMPLES, len(splits["train"].examples))):
        console.print(render_example(splits["train"], index, tokenizer))


def render_statistics(splits: dict[str, Split | None]) -> Table:
    table = Table("split", "examples", "input p50/p90/max", "target p50/p90/max", "tokens", "truncated")
    for which, split in splits.items():
        if split is not None:
            found = token_statistics(split.examples)
            spreads = ["{p50} / {p90} / {max}".format(**found[part]) for part in ("input_tokens", "target_tokens")]
            total = found["input_tokens"]["total"] + found["target_tokens"]["total"]
            table.add_row(
                which, f"{found['num_examples']:,}", *spreads, f"{total:,}",
                f"{found['num_truncated']:,} ({found['truncated_share']:.1%})",
            )  # fmt: skip
    return table


def describe_epochs(config: Config, split: Split) -> str:
    epochs = config.train.max_steps * config.train.batch_size / len(split.examples)
    return f"{config.train.max_steps:,} steps of {config.train.batch_size} are {epochs:.1f} epochs"


def render_example(split: Split, index: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """One example as the base reads it: virtual tokens, input, [target]; line breaks shown as \\n."""
    before, after = (
        tokenizer.decode(ids).replace("\n", "\\n")
        for ids in (split.examples.input_ids(index), split.examples.target_ids(index))
    )
    return Text.assemble(("<virtual tokens>", "dim"), before, ("[" + after + "]", "bold green"))
