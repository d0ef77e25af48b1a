"""From the config's `data` section to encoded examples: the one place of this folder that sees a config."""

import dataclasses
import hashlib
from dataclasses import dataclass

import datasets
import numpy as np

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.candidates import CandidateInput, Candidates, build_candidates
from ptune_dist.data.encode import Encoding, Examples, TokenPair, encode_inputs, encode_rows, encode_text_blocks
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
        if self.examples.numbers is not None:
            hashed.update(self.examples.numbers.tobytes())
        return hashed.hexdigest()[:16]


def build_split(data: DataConfig, encoding: Encoding, *, which: str, max_examples: int = 0) -> Split | None:
    """The `train` or `validation` split of config section `data`; None where none is given. Raises UserError."""
    source = getattr(data, which)
    if source is None:
        return None
    rows = load_rows(source, key=f"data.{which}", default_split=which)
    if max_examples and len(rows) > max_examples:
        rows = dataclasses.replace(rows, dataset=rows.dataset.select(range(max_examples)))
    if rows.kind != "text":
        return Split(rows, encode_with_templates(data, rows, encoding))
    if not encoding.framing.reads_plain_text:
        raise UserError(f"data.{which}: {rows.name} is plain text, which only a causal base can be trained on")
    if encoding.placement == "template":
        raise UserError(f"data.{which}: {rows.name} is plain text, which has no template for {{{{ prompt }}}}")
    return Split(rows, encode_text_blocks(rows, encoding.tokenizer, max_length=data.max_length))


def encode_with_templates(data: DataConfig, rows: Rows, encoding: Encoding) -> Examples:
    template, target = build_templates(data, encoding.placement)
    available = list(rows.columns())
    check_columns(template, available, key="data.template", source_name=rows.name)
    check_columns(target, available, key="data.target", source_name=rows.name)
    return encode_rows(rows, encoding, template=template, target=target)


def build_templates(data: DataConfig, placement: str = "prefix") -> tuple[Template, Template]:
    """The compiled `data.template`, with a marker under placement template, and `data.target`. Raises UserError."""
    if data.template is None or data.target is None:
        raise UserError("data.template and data.target are needed unless the data is a .txt file")
    return (
        compile_template(data.template, key="data.template", marker=placement == "template"),
        compile_template(data.target, key="data.target"),
    )


def build_inputs(data: DataConfig, rows: Rows, encoding: Encoding) -> list[TokenPair]:
    """Token ids of the inputs of rows that need no target, each as (context, rest). Raises UserError."""
    template, _ = build_templates(data, encoding.placement)
    check_columns(template, list(rows.columns()), key="data.template", source_name=rows.name)
    return encode_inputs(rows, encoding, template=template)


def build_label_candidates(
    data: DataConfig, split: Split, encoding: Encoding, most_tokens: int
) -> tuple[Candidates, list[int]]:
    """For accuracy by likelihood: every row's input with all labels, and each row's right label. Raises UserError.

    `most_tokens`: of the labels that are scored in one pass.
    """
    template, target = build_templates(data, encoding.placement)
    if len(target.columns) != 1:
        raise UserError(f"data.labels: data.target must use one column, it uses {', '.join(target.columns) or 'none'}")
    (column,) = target.columns
    labels = data.labels or []
    values = split.rows.dataset[column]
    right = []
    for i, value in enumerate(values):
        if str(value) not in labels:
            raise UserError(f"{split.rows.where(i)}: {column} is {value!r}, which data.labels does not list")
        right.append(labels.index(str(value)))
    typed = {str(value): value for value in values}  # a template may count on a column's numbers

    def encode(label: str, dataset: datasets.Dataset) -> Examples:
        """Rows as they would be with this label."""
        dataset = dataset.remove_columns(column).add_column(column, [typed.get(label, label)] * len(dataset))
        return encode_with_templates(data, dataclasses.replace(split.rows, dataset=dataset), encoding)

    first = split.rows.dataset.select([0])
    label_ids = [encode(label, first).target_ids(0).tolist() for label in labels]
    if column in template.columns:  # the input differs from label to label
        kinds = [[number] for number in range(len(labels))]
    else:  # a long label may leave less of the input
        by_length = {len(ids): [n for n, other in enumerate(label_ids) if len(other) == len(ids)] for ids in label_ids}
        kinds = [by_length[length] for length in sorted(by_length, reverse=True)]
    longest = encode(labels[kinds[0][0]], split.rows.dataset)
    if column not in template.columns and not longest.num_truncated:
        kinds = [list(range(len(labels)))]
    encoded = [longest, *(encode(labels[kind[0]], split.rows.dataset) for kind in kinds[1:])]
    inputs = [found for row in range(len(split.rows)) for found in distinct_inputs(row, kinds, encoded)]
    return build_candidates(inputs, label_ids, split.examples, most_tokens), right


def distinct_inputs(row: int, kinds: list[list[int]], encoded: list[Examples]) -> list[CandidateInput]:
    """The inputs of a row, each with the labels that leave it so; `encoded` are the rows with labels of each kind."""
    found: dict[tuple[int, bytes], list[int]] = {}
    for kind, examples in zip(kinds, encoded, strict=True):
        key = (int(examples.num_context[row]), examples.input_ids(row).tobytes())
        found.setdefault(key, []).extend(kind)
    return [
        CandidateInput(row, np.frombuffer(ids, np.int32), num_context, tuple(sorted(numbers)))
        for (num_context, ids), numbers in found.items()
    ]
