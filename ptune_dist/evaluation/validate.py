"""`validate`: what a config will do, before anything is trained.

Floor 6. Reads the data, the base's shape, the headers of its weights and a few embeddings; not what depends on the
machine that it will run on (memory, NVMe, the number of ranks).
"""

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ptune_dist.base.open import OpenedBase
from ptune_dist.config.load import render_config
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.data.build import Split, build_split
from ptune_dist.data.encode import token_statistics
from ptune_dist.evaluation.evaluator import build_evaluator
from ptune_dist.evaluation.placement_costs import describe_cache, describe_choice, render_costs
from ptune_dist.run.folder import check_run_dir
from ptune_dist.run.job import build_parts

NUM_EXAMPLES = 5
SPLITS = ("train", "validation")


def validate(config: Config) -> None:
    """Print the resolved config, token statistics and five examples. Raises UserError for whatever is wrong."""
    console = Console(highlight=False, soft_wrap=True)
    check_run_dir(config)
    opened, tokenizer, _, content = build_parts(config, None, with_start=True)
    family = opened.family
    splits = {}
    for name, member in expand_sweep(config).items():
        label = f" ({name})" if config.sweep else ""
        for which in SPLITS:
            split = build_split(member.data, tokenizer, which=which, family=family, placement=config.prompt.placement)
            if split and not any(split.digest() == known.digest() for known in splits.values()):
                splits[which + label] = split
        if held_out := splits.get("validation" + label):
            build_evaluator(member, held_out, tokenizer, family)
    train = next(iter(splits.values()))

    console.rule("config")
    console.print(render_config(config), markup=False)
    console.rule("DeepSpeed's JSON, filled in")
    console.print(json.dumps(content, indent=2), markup=False)
    console.rule("tokens")
    console.print(render_statistics(splits))
    console.print(f"base: {describe_base(opened)}; {describe_epochs(config, train)}")
    if config.sweep:
        console.print(f"members: {len(expand_sweep(config))}: {', '.join(expand_sweep(config))}", markup=False)
    if family != "encoder" and train.rows.kind != "text":
        console.rule("placement")
        if family == "causal":
            console.print(render_costs(train.examples, config))
        console.print(describe_cache(train.examples, config, opened.model.config, family))
        console.print(describe_choice(config.prompt.placement))
    console.rule(Text("examples, the supervised part in [brackets]"))
    for index in range(min(NUM_EXAMPLES, len(train.examples))):
        console.print(render_example(train, index, tokenizer, config.data.labels, family))


def describe_base(opened: OpenedBase) -> str:
    parameters = list(opened.model.parameters())
    num_bytes = sum(p.numel() * p.element_size() for p in parameters)
    size = f"{sum(p.numel() for p in parameters):,} parameters in {num_bytes / (1 << 20):,.1f} MiB"
    return f"{opened.model.config.model_type} ({opened.family}), {size}"


def render_statistics(splits: dict[str, Split]) -> Table:
    table = Table("split", "examples", "input p50/p90/max", "target p50/p90/max", "tokens", "truncated")
    for which, split in splits.items():
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


def render_example(
    split: Split, index: int, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None, family: str
) -> Text:
    """One example as the base reads it: context, virtual tokens, rest, [target]; line breaks shown as \\n."""
    examples = split.examples
    before, after = (
        tokenizer.decode(ids).replace("\n", "\\n") for ids in (examples.context_ids(index), examples.rest_ids(index))
    )
    target = examples.target_ids(index)
    named = labels[target[0]] if family == "encoder" else tokenizer.decode(target).replace("\n", "\\n")
    return Text.assemble(before, ("<virtual tokens>", "dim"), after, ("[" + named + "]", "bold green"))
