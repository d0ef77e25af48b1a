"""What each placement would cost and a context cache would hold, from token statistics: arithmetic, nothing is run.

Floor 6. Costs are in passes of the base's layers over a token: 2 for forward and the way back to the layers' inputs, 1
where no gradient is wanted. Attention, a few percent of it on rows of some hundred tokens, and the head are left out.
"""

import numpy as np
import torch
from rich.table import Table
from transformers import PretrainedConfig

from ptune_dist.config import Config
from ptune_dist.data.encode import Examples

GIB = 1 << 30


def context_bytes_per_token(shape: PretrainedConfig, family: str, dtype: torch.dtype) -> int:
    """What is kept of a context's token: keys and values of every layer, or the encoder's output for seq2seq."""
    text = shape.get_text_config(decoder=True)
    if family == "seq2seq":
        return text.hidden_size * dtype.itemsize
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * num_heads * head_width * dtype.itemsize


def placement_costs(examples: Examples, num_virtual: int) -> dict[str, float]:
    """Mean passes per row of a causal base when all of the input stood before the virtual tokens, or after them."""
    rows = examples.widths.astype(np.float64)
    inputs, targets = rows[:, 0].mean(), rows[:, 1].mean()
    live = 2 * (num_virtual + targets - 1)
    return {
        # virtual tokens are shared by all rows of a micro-batch, and a text's last token is not read
        "prefix": 2 * (inputs + targets - 1),
        "infix": inputs + live,
        "infix, contexts cached": live,
    }


def count_context_tokens(examples: Examples, *, all_of_input: bool) -> int:
    """Tokens of the distinct contexts, those of a placement where the whole input is one with `all_of_input`."""
    read = examples.input_ids if all_of_input else examples.context_ids
    distinct = {hash(ids.tobytes()): len(ids) for ids in map(read, range(len(examples)))}
    return sum(distinct.values())


def render_costs(examples: Examples, config: Config) -> Table:
    """Placements of a causal base beside each other."""
    costs = placement_costs(examples, config.prompt.num_virtual_tokens)
    table = Table("placement", "passes of the layers per row", "of prefix")
    for name, cost in costs.items():
        table.add_row(name, f"{cost:,.0f}", f"{cost / costs['prefix']:.2f}")
    return table


def describe_cache(examples: Examples, config: Config, shape: PretrainedConfig, family: str) -> str:
    """How much a cache of all contexts would be, and what the config gives it."""
    placement = config.prompt.placement
    is_split = placement in ("template", "decoder", "infix")
    tokens = count_context_tokens(examples, all_of_input=not is_split)
    size = tokens * context_bytes_per_token(shape, family, getattr(torch, config.model.dtype))
    given = config.train.context_cache_gib
    what = f"contexts of {placement}" if is_split else "as contexts (infix), the inputs"
    text = f"{what} are {tokens:,} distinct tokens, {size / GIB:,.2f} GiB when all are cached"
    epochs = config.train.max_steps * config.train.batch_size / len(examples)
    if given:
        text += f" of which {min(1.0, given * GIB / max(1, size)):.0%} fit one rank's train.context_cache_gib={given:g}"
    return text + f"; each would be read {epochs:.1f} times"


def describe_choice(placement: str) -> str:
    if placement in ("prefix", "encoder"):
        return "prefix reads the input in the light of the prompt; infix does not, which can cost quality (README)"
    return "the input is read before the prompt, which saves work and can cost quality: compare with prefix"
