"""From the config's `data` section to encoded examples: the one place of this folder that sees a config."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ptune_dist.common.progress_line import REPORT_S, ProgressLine
from ptune_dist.config.prompt_text import Around
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.alternatives import AlternativeRows
from ptune_dist.data.cache_entry import where_of
from ptune_dist.data.candidates import CandidateInput, Candidates, build_candidates
from ptune_dist.data.chat import INPUT, TARGET, ask_rows
from ptune_dist.data.encode import (
    Encoding,
    TokenPair,
    cut_blocks,
    encode_chunk,
    encode_inputs,
    encode_rows,
    join_lines,
)
from ptune_dist.data.examples import Examples, Part, join_parts
from ptune_dist.data.held_out import HeldOut, choose_held_out, read_held_out
from ptune_dist.data.json_values import text_of
from ptune_dist.data.label_names import describe_unlisted
from ptune_dist.data.references import checking_references
from ptune_dist.data.skipping import Skipped, count_kept, encode_sound_rows, group_skipped
from ptune_dist.data.sources import Rows
from ptune_dist.data.split_rows import (
    arrange,
    check_csv_keys,
    is_first_of_several,
    is_grouped,
    load_source_rows,
    load_split,
)
from ptune_dist.data.tasks import read_tasks, with_tasks
from ptune_dist.data.template import (
    MARKER_NAME,
    TARGET_KEY,
    TEMPLATE_KEY,
    Template,
    check_columns,
    compile_template,
    name_nearest,
    surround,
)
from ptune_dist.data.token_cache import open_cache
from ptune_dist.data.views import GroupedRows, PickedRows
from ptune_dist.data.workers import Encode, encode_by_all_cores, map_by_all_cores
from ptune_dist.errors import UserError

CHAT_INPUT = compile_template(f"{{{{ {INPUT} }}}}", key=TEMPLATE_KEY)
CHAT_TARGET = compile_template(f"{{{{ {TARGET} }}}}", key=TARGET_KEY)
PLAIN_TEXT = compile_template("{{ text[:-1] if text[-1:] == '\\n' else text }}", key=TEMPLATE_KEY)


@dataclass(frozen=True)
class Split:
    """The rows of one source and their token ids.

    held_out: which training rows validate, where they are drawn. ends: int64 [rows], how many examples each row and
    those before it make, where they make several: all are read together where `takes_all`, else one in each epoch.
    skipped: the rows that cannot be used.
    """

    rows: Rows
    examples: Examples
    held_out: HeldOut | None = None
    ends: np.ndarray | None = None
    takes_all: bool = False
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def num_rows(self) -> int:
        """How many rows an epoch has."""
        return len(self.examples) if self.ends is None else len(self.ends)

    def digest(self) -> str:
        """Tells whether a resumed run still sees the same examples."""
        own = self.examples.known.digest
        if self.ends is None:
            return own
        return f"{own}/{hashlib.sha256(np.ascontiguousarray(self.ends).data).hexdigest()[:16]}"


def build_split(
    data: DataConfig, encoding: Encoding, *, which: str, max_examples: int = 0, folder: Path | None = None
) -> Split | None:
    """The `train` or `validation` split of config section `data`; None where none is given. Raises UserError.

    folder: of a run, which may have stored its validation rows.
    """
    if getattr(data, which) is None:
        return None
    check_csv_keys(data)
    read_source = functools.cache(lambda: load_source_rows(data))
    held_out = None
    if data.holds_out:
        held_out = read_held_out(data, folder) or choose_held_out(data, read_source())

    @functools.cache
    def load_own() -> Rows:
        rows = load_split(data, which, held_out, read_source)
        return rows.first(max_examples) if max_examples else rows

    @functools.cache
    def load() -> Rows:
        return arrange(data, encoding, which, load_own())

    selection = held_out.name if held_out and not held_out.is_fresh else ""
    rows, examples, wrong = encode_or_find(data, encoding, load, (which, max_examples, selection))
    kept = rows.chosen if wrong and isinstance(rows, PickedRows) else None
    skipped = Skipped() if kept is None else group_skipped(wrong, load(), kept)
    ends = None
    if is_grouped(data, which):
        arranged = load()
        assert isinstance(arranged, GroupedRows)
        ends = arranged.ends if kept is None else count_kept(arranged.ends, kept)
    elif is_first_of_several(data, which):  # metrics read all references
        rows = load_own() if kept is None else PickedRows.of(load_own(), kept)
    tasks = read_tasks(data, rows)
    takes_all = data.messages is not None
    return Split(rows, with_tasks(examples, tasks), held_out, ends=ends, takes_all=takes_all, skipped=skipped)


def encode_or_find(
    data: DataConfig, encoding: Encoding, load: Callable[[], Rows], chosen: tuple[str, int, str]
) -> tuple[Rows, Examples, dict[int, str]]:
    """The rows that `load` gives, their examples, and what is wrong with each row that is skipped, which the rows lack.

    chosen: what tells the rows apart from others of the same files, the split first.
    """
    which = chosen[0]

    def encode(rows: Rows) -> Generator[Part, None, None]:
        return encode_split(data, rows, encoding, which)

    skips = data.on_error == "skip"
    cache = None if skips or isinstance(data.tasks, dict) else open_cache(data, encoding, *chosen)
    if cache is not None:
        return *cache.get(load, encode), {}
    rows = load()
    if not skips or rows.kind == "text":
        return rows, join_parts(encode(rows), where_of(rows)), {}
    encode_range: Encode = build_encode(data, rows, encoding)
    if which == "validation" and data.references is not None:  # which metrics read
        answered = rows.whole if isinstance(rows, AlternativeRows) else rows
        encode_range = checking_references(encode_range, data.references, answered)
    parts, kept, wrong = encode_sound_rows(rows, encode_range)
    rows = PickedRows.of(rows, kept) if wrong else rows
    return rows, join_parts(parts, where_of(rows)), wrong


def encode_split(data: DataConfig, rows: Rows, encoding: Encoding, which: str) -> Generator[Part, None, None]:
    """The token ids of rows, in parts. Raises UserError."""
    if rows.kind != "text":
        yield from encode_by_all_cores(rows, build_encode(data, rows, encoding))
        return
    if not encoding.framing.reads_plain_text:
        raise UserError(f"data.{which}: {rows.name} is plain text, which only a causal base can be trained on")
    if encoding.placement == "template":
        raise UserError(f"data.{which}: {rows.name} is plain text, which has no template for {{{{ prompt }}}}")
    encode = functools.partial(
        encode_chunk, name=rows.name, tokenizer=encoding.tokenizer, num_embeddings=encoding.num_embeddings
    )
    progress = ProgressLine(f"tokenizing lines of {rows.name}", len(rows), between_s=REPORT_S)
    chunks = join_lines(rows, progress.count)
    pieces = map_by_all_cores(encode, chunks, num_rows=len(rows))
    yield from cut_blocks(pieces, encoding.max_length, rows.name)


def build_encode(data: DataConfig, rows: Rows, encoding: Encoding) -> Callable[..., Examples]:
    """What encodes a range of rows. Raises UserError for columns that the templates cannot use."""
    template, target = build_templates(data, encoding.placement, encoding.around)
    check_template_columns(template, rows)
    check_readable(target, rows, TARGET_KEY)
    check_columns(target, list(rows.columns()), key=TARGET_KEY, source_name=rows.name)
    if data.labels and len(target.columns) == 1 and encoding.targets.takes_room:  # classes are checked as such
        target = dataclasses.replace(target, labels=tuple(data.labels))
    return functools.partial(encode_rows, rows, encoding, template=template, target=target)


def check_template_columns(template: Template, rows: Rows) -> None:
    """Raise UserError where rows lack a column of the input's template, or have one that its marker would hide."""
    available = list(rows.columns())
    if template.has_marker and MARKER_NAME in available:
        raise UserError(
            f"data.template: {rows.name} has a column 'prompt', and with prompt.placement=template {{{{ prompt }}}} "
            "marks where the virtual tokens stand: rename the column, or choose another placement"
        )
    check_readable(template, rows, TEMPLATE_KEY)
    check_columns(template, available, key=TEMPLATE_KEY, source_name=rows.name)


def check_readable(template: Template, rows: Rows, key: str) -> None:
    """Raise UserError where a template names a column whose type cannot be read."""
    for column in template.row_columns:
        if column in rows.unreadable:
            raise UserError(
                f"{key} uses column {column!r} of {rows.name}, whose type {rows.unreadable[column]} cannot be read; "
                "save it as a struct, a list or text"
            )


def build_templates(
    data: DataConfig, placement: str = "prefix", around: Around | None = None
) -> tuple[Template, Template]:
    """The compiled `data.template`, with a marker under placement template, and `data.target`. Raises UserError.

    around: the texts that stand around `data.template`.
    """
    if data.messages is not None:
        return CHAT_INPUT, CHAT_TARGET
    if data.template is None or data.target is None:
        raise UserError("data.template and data.target are needed unless the data is a .txt file")
    optional = data.optional_columns
    template = compile_template(data.template, key=TEMPLATE_KEY, marker=placement == "template", optional=optional)
    target = compile_template(data.target, key=TARGET_KEY, optional=optional)
    if around is not None:
        template = surround(template, around)
    used = sorted({*template.columns, *target.columns})
    for column in optional:
        if column not in used:
            hint = name_nearest(column, used, "? ")
            raise UserError(f"data.optional_columns: no template uses {column!r}; {hint}used: {', '.join(used)}")
    return template, target


def build_inputs(data: DataConfig, rows: Rows, encoding: Encoding) -> list[TokenPair]:
    """Token ids of the inputs of rows that need no target, each as (context, rest). Raises UserError.

    Where the training data is plain text, an input is the column `text` as it stands: what the answer continues.
    """
    if data.messages is not None:
        assert encoding.chat is not None
        return encode_inputs(ask_rows(rows, data, encoding.chat), encoding, template=CHAT_INPUT)
    if data.template is None:
        check_columns(PLAIN_TEXT, list(rows.columns()), key="--input-file", source_name=rows.name)
        plain = dataclasses.replace(encoding, framing=dataclasses.replace(encoding.framing, is_bare=True))
        return encode_inputs(rows, plain, template=PLAIN_TEXT)
    template, _ = build_templates(data, encoding.placement, encoding.around)
    check_template_columns(template, rows)
    return encode_inputs(rows, encoding, template=template)


def build_label_candidates(
    data: DataConfig, split: Split, encoding: Encoding, most_tokens: int
) -> tuple[Candidates, list[int]]:
    """For accuracy by likelihood: every row's input with all labels, and each row's right label. Raises UserError.

    `most_tokens`: of the labels that are scored in one pass.
    """
    column = label_column(data)
    labels = data.labels or []
    values = [row.get(column) for row in split.rows.read(0, len(split.rows))]
    right = []
    for i, value in enumerate(values):
        if text_of(value) not in labels:
            raise UserError(describe_unlisted(split.rows.where(i), column, value, labels))
        right.append(labels.index(text_of(value)))
    typed = {text_of(value): value for value in values}  # a template may count on a column's numbers
    choices: list[object] = [typed.get(label, label) for label in labels]
    return encode_candidates(data, split.rows, encoding, choices, most_tokens, split.examples.tasks), right


def build_choices(
    data: DataConfig, rows: Rows, encoding: Encoding, most_tokens: int, tasks: np.ndarray | None = None
) -> Candidates:
    """Every row's input with all of `data.labels`, for rows that need no label of their own. Raises UserError."""
    if not data.labels:
        raise UserError("--labels: the run's config has no data.labels to choose among: name them, as yes,no")
    _, target = build_templates(data, encoding.placement)
    choices = label_values(target, label_column(data), data.labels)
    return encode_candidates(data, rows, encoding, choices, most_tokens, tasks)


def label_column(data: DataConfig) -> str:
    """The one column of `data.target`, whose values the labels are. Raises UserError."""
    _, target = build_templates(data)
    if len(target.columns) != 1:
        raise UserError(f"data.labels: data.target must use one column, it uses {', '.join(target.columns) or 'none'}")
    return target.columns[0]


def label_values(target: Template, column: str, labels: list[str]) -> list[object]:
    """The labels as a row would hold them: as numbers, true and false, or texts, whichever the template tells apart."""
    for read in (read_value, str):
        values = [read(label) for label in labels]
        try:
            texts = {target.with_fixed(column, value).render({}) for value in values}
        except Exception:  # expressions are the user's code and may raise anything
            continue
        if len(texts) == len(labels):
            return values
    raise UserError(f"data.labels: data.target does not render {', '.join(labels)} as texts that differ")


def read_value(label: str) -> object:
    """A label as the JSON value that prints like it, if there is one."""
    known: dict[str, object] = {"true": True, "false": False}
    for kind in (int, float):
        try:
            known.setdefault(str(kind(label)), kind(label))
        except ValueError:
            continue
    return known.get(label, label)


def encode_candidates(
    data: DataConfig,
    rows: Rows,
    encoding: Encoding,
    choices: Sequence[object],
    most_tokens: int,
    tasks: np.ndarray | None,
) -> Candidates:
    """Every row's input with all labels, whose values are `choices`; `tasks` of the rows. Raises UserError."""
    column = label_column(data)
    template, target = build_templates(data, encoding.placement, encoding.around)
    check_template_columns(template.with_fixed(column, None), rows)

    def encode(number: int, some: Rows) -> Examples:
        """Rows as they would be with this label."""
        value = choices[number]
        own = template.with_fixed(column, value)
        return encode_rows(some, encoding, template=own, target=target.with_fixed(column, value))

    numbers = list(range(len(choices)))
    label_ids = [encode(number, rows.first(1)).target_ids(0).tolist() for number in numbers]
    for number in numbers:
        first = label_ids.index(label_ids[number])
        if first != number:
            raise UserError(f"data.labels: {choices[first]!r} and {choices[number]!r} have the same target")
    if column in template.columns:  # the input differs from label to label
        kinds = [[number] for number in numbers]
    else:  # a long label may leave less of the input
        by_length = {len(ids): [n for n in numbers if len(label_ids[n]) == len(ids)] for ids in label_ids}
        kinds = [by_length[length] for length in sorted(by_length, reverse=True)]
    longest = dataclasses.replace(encode(kinds[0][0], rows), tasks=tasks)
    if column not in template.columns and not longest.num_truncated:
        kinds = [numbers]
    encoded = [longest, *(encode(kind[0], rows) for kind in kinds[1:])]
    inputs = [found for row in range(len(rows)) for found in distinct_inputs(row, kinds, encoded)]
    return build_candidates(inputs, label_ids, longest, most_tokens)


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
