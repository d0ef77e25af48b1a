"""Estimate the cost of each placement and the size of a context cache from token counts, without running anything.

Costs are in passes of the base's layers over a token: 2 for forward and backward to the layers' inputs, 1 without
gradient. The head is left out, and so is attention, which is a few percent for rows of some hundred tokens.
"""

import statistics

import numpy as np
import torch
from rich.table import Table
from transformers import PretrainedConfig

from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS, Config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.data.examples import Examples, count_equal
from ptune_dist.families.family import Family
from ptune_dist.prompts.build import check_options, find_method

GIB = 1 << 30


def without_lead(contexts: list[np.ndarray]) -> list[int]:
    """Lengths of contexts without the tokens that all of them begin with, which are computed once per job."""
    num_lead = min((count_equal(contexts[0], context) for context in contexts), default=0)
    return [len(context) - num_lead for context in contexts]


def placement_costs(
    examples: Examples, num_virtual: float, *, num_members: int = 1, with_template: bool = False
) -> dict[str, float]:
    """Mean passes per row and prompt of a causal base, by placement; `num_members` prompts read each row.

    prefix: the whole input follows the virtual tokens. infix: it precedes them. template, `with_template`: it is split
    as the examples are.
    """
    rows = range(len(examples))
    inputs, targets = examples.widths.astype(np.float64).mean(axis=0)
    # The last token of a text is not read. Virtual tokens that depend on no row are shared by a micro-batch.
    live = 2 * (num_virtual + targets - 1)
    whole = without_lead([examples.input_ids(i) for i in rows])
    costs = {
        "prefix": 2 * (inputs + targets - 1),
        "infix": statistics.fmean(whole) / num_members + live,
        "infix, contexts cached": live,
    }
    if with_template:
        own = without_lead([examples.context_ids(i) for i in rows])
        rest = inputs - examples.num_context.mean()
        shared = 0 if any(own) else num_virtual
        costs["template"] = statistics.fmean(own) / num_members + live + 2 * (rest - shared)
        costs["template, contexts cached"] = live + 2 * (rest - shared)
    return {name: float(cost) for name, cost in costs.items()}


def count_vectors(member: Config) -> int:
    """Virtual tokens that the layers compute; keys and values of a prompt cost no pass."""
    return member.prompt.num_virtual_tokens if find_method(member.prompt).stands_in_sequence else 0


def count_context_tokens(examples: Examples, *, all_of_input: bool, has_lead: bool) -> int:
    """Tokens in a cache of all distinct contexts; with `all_of_input`, of a placement whose contexts are the inputs."""
    read = examples.input_ids if all_of_input else examples.context_ids
    distinct = {ids.tobytes(): ids for ids in map(read, range(len(examples)))}
    contexts = [ids for ids in distinct.values() if len(ids)]
    return sum(without_lead(contexts)) if has_lead else sum(map(len, contexts))


def render_costs(examples: Examples, config: Config) -> Table:
    """A table of the costs of placements of a causal base."""
    members = expand_sweep(config).values()
    costs = placement_costs(
        examples,
        statistics.mean(count_vectors(member) for member in members),
        num_members=len(members),
        with_template=config.prompt.placement == "template",
    )
    table = Table("placement", "passes of the layers per row" + (" and prompt" if config.sweep else ""), "of prefix")
    for name, cost in costs.items():
        table.add_row(name, f"{cost:,.0f}", f"{cost / costs['prefix']:.2f}")
    return table


def describe_cache(examples: Examples, config: Config, shape: PretrainedConfig, family: Family) -> str:
    """How much a cache of all contexts would be, and what the config gives it."""
    placement = config.prompt.placement
    is_split = placement in PLACEMENTS_WITH_CONTEXTS
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    if is_split or not find_method(config.prompt).enters_late(check_options(config.prompt)):
        tokens = count_context_tokens(examples, all_of_input=not is_split, has_lead=family.shares_leads)
        size = tokens * family.context_bytes_per_token(shape, dtype)
        what = f"the contexts of {placement}" if is_split else "with infix, the contexts"
    else:  # a vector of each token that is read
        tokens = int(examples.lengths_of(list(range(len(examples)))).sum()) - len(examples)
        size = tokens * shape.get_text_config().hidden_size * dtype.itemsize
        what = "the rows, as the layers below the prompt leave them,"
    given = config.train.context_cache_gib
    text = f"{what} have {tokens:,} distinct tokens, {size / GIB:,.2f} GiB if all are cached"
    epochs = config.train.max_steps * config.train.batch_size / len(examples)
    if given:
        share = min(1.0, given * GIB / max(1, size))
        text += f", of which {share:.0%} fit in train.context_cache_gib={given:g} of one rank"
    return text + f"; each is read {epochs:.1f} times"


def describe_choice(placement: str) -> str:
    """A line about the trade-off of a placement."""
    if placement in ("prefix", "encoder", "both"):
        return (
            "prefix reads the input with the prompt in view; infix does not, which can cost quality (docs/concepts.md)"
        )
    return "the input is read before the prompt, which saves work and can cost quality: compare with prefix"
