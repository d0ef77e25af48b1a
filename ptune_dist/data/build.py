"""From the config's `data` section to encoded examples: the one place of this floor that sees a config."""

import dataclasses
import hashlib
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ptune_dist.data.encode import Examples, TokenPair, encode_inputs, encode_rows, encode_text_blocks
from ptune_dist.data.sources import Rows, load_rows
from ptune_dist.data.template import Template, check_columns, compile_template
from ptune_dist.errors import UserError


@dataclass(frozen=True)
class Split:
    """The rows of one source and their token ids."""

    rows: Rows
    examples: Examples

    def digest(self) -> str:
        """Tells whether a resumed run still sees the same examples."""
        hashed = hashlib.sha256(self.examples.ids.tobytes())
        hashed.update(self.examples.offsets.tobytes())
        if self.examples.num_context.any():  # runs that have no contexts keep the digest they always had
            hashed.update(self.examples.num_context.tobytes())
        return hashed.hexdigest()[:16]


def build_split(
    data, tokenizer: PreTrainedTokenizerBase, *, which: str, family: str = "causal", placement: str = "prefix",
    max_examples: int = 0,
) -> Split | None:  # fmt: skip
    """The `train` or `validation` split of config section `data`; None where none is given. Raises UserError.

    `placement` is the resolved one of prompt.placement: it decides which tokens are context.
    """
    source = getattr(data, which)
    if source is None:
        return None
    rows = load_rows(source, key=f"data.{which}", default_split=which)
    if max_examples and len(rows) > max_examples:
        rows = dataclasses.replace(rows, dataset=rows.dataset.select(range(max_examples)))
    if rows.kind == "text":
        if family != "causal":
            raise UserError(f"data.{which}: {rows.name} is plain text, which a {family} base cannot be trained on")
        if placement == "template":
            raise UserError(f"data.{which}: {rows.name} is plain text, which has no template for {{{{ prompt }}}}")
        return Split(rows, encode_text_blocks(rows, tokenizer, max_length=data.max_length))
    return Split(rows, encode_with_templates(data, rows, tokenizer, family, placement))


def encode_with_templates(
    data, rows: Rows, tokenizer: PreTrainedTokenizerBase, family: str, placement: str = "prefix"
) -> Examples:
    template, target = build_templates(data, placement)
    available = list(rows.columns())
    check_columns(template, available, key="data.template", source_name=rows.name)
    check_columns(target, available, key="data.target", source_name=rows.name)
    return encode_rows(
        rows, tokenizer, template=template, target=target, max_length=data.max_length, append_eos=data.append_eos,
        truncation_side=data.truncation_side, family=family, labels=data.labels,
        placement=placement,
    )  # fmt: skip


def build_templates(data, placement: str = "prefix") -> tuple[Template, Template]:
    """The compiled `data.template`, with a marker under placement template, and `data.target`. Raises UserError."""
    if data.template is None or data.target is None:
        raise UserError("data.template and data.target are needed unless the data is a .txt file")
    return (
        compile_template(data.template, key="data.template", marker=placement == "template"),
        compile_template(data.target, key="data.target"),
    )


def build_inputs(
    data, rows: Rows, tokenizer: PreTrainedTokenizerBase, family: str, placement: str = "prefix"
) -> list[TokenPair]:
    """Token ids of the inputs of rows that need no target, each as (context, rest). Raises UserError."""
    template, _ = build_templates(data, placement)
    check_columns(template, list(rows.columns()), key="data.template", source_name=rows.name)
    return encode_inputs(
        rows,
        tokenizer,
        template=template,
        max_length=data.max_length,
        family=family,
        truncation_side=data.truncation_side,
        placement=placement,
    )


def build_label_candidates(
    data, split: Split, tokenizer: PreTrainedTokenizerBase, family: str, placement: str = "prefix"
) -> tuple[list[Examples], list[int]]:
    """For accuracy by likelihood: the split once per label with that label as target, and each row's right label."""
    _, target = build_templates(data, placement)
    if len(target.columns) != 1:
        raise UserError(f"data.labels: data.target must use one column, it uses {', '.join(target.columns) or 'none'}")
    (column,) = target.columns
    right = []
    for i, value in enumerate(split.rows.dataset[column]):
        if str(value) not in data.labels:
            raise UserError(f"{split.rows.where(i)}: {column} is {value!r}, which data.labels does not list")
        right.append(data.labels.index(str(value)))
    candidates = []
    typed = {str(value): value for value in split.rows.dataset[column]}  # a template may count on a column's numbers
    for label in data.labels:
        label = typed.get(label, label)
        dataset = split.rows.dataset.remove_columns(column).add_column(column, [label] * len(split.rows))
        rows = dataclasses.replace(split.rows, dataset=dataset)
        candidates.append(encode_with_templates(data, rows, tokenizer, family, placement))
    return candidates, right
