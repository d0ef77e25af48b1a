"""What is odd about the rows of a run though nothing forbids it: a line each, for `train` and `validate`.

Everything is computed from the token ids, a chunk at a time, so that it takes about a second for millions of rows.
"""

import re
from collections.abc import Iterator

import numpy as np

from ptune_dist.config.schema import Config
from ptune_dist.data.build import Split, build_templates
from ptune_dist.data.encode import Encoding
from ptune_dist.data.examples import Examples, chunks_of
from ptune_dist.data.framing import special_ids, tokenize
from ptune_dist.data.sources import Rows
from ptune_dist.data.template import MARKER, Template, find_absent, find_shared, name_nearest, render_batches
from ptune_dist.evaluation.evaluator import Evaluator, longest_wanted
from ptune_dist.evaluation.splits import RunRows
from ptune_dist.prompts.build import find_method
from ptune_dist.run.reading import Reading

MANY_EPOCHS = 100
CUES = (":", "=", ">")  # how an input ends that a target continues
BRACED = re.compile(r"(?<!\{)\{\s*(\w+)\s*\}(?!\})")


def find_warnings(reading: Reading, read: RunRows) -> list[str]:
    """A line for each odd thing; what several members share is named once."""
    found: dict[str, None] = {}
    for name, member in reading.members.items():
        split = read.splits[name]
        evaluator = read.evaluators.get(name)
        for line in warn_of_member(reading, member, split, evaluator):
            found[line] = None
    return list(found)


def warn_of_member(reading: Reading, member: Config, split: Split, evaluator: Evaluator | None) -> Iterator[str]:
    yield from warn_of_start(reading, member)
    yield from warn_of_start_rows(member, split.examples)
    yield from warn_of_cut_example(member, split.examples)
    yield from warn_of_text(member)
    yield from warn_of_length(member, split.num_rows)
    if split.rows.kind != "text":
        templates = build_templates(member.data, member.prompt.placement, member.prompt.around)
        yield from warn_of_templates(templates, split.rows)
        if not member.data.is_chat:
            yield from warn_of_specials(templates, split.rows, reading.encoding(member))
        yield from warn_of_sameness(templates, split.examples)
    if evaluator:
        yield from warn_of_validation(split, evaluator)
        yield from warn_of_answers(reading, member, evaluator)


def warn_of_start(reading: Reading, member: Config) -> Iterator[str]:
    """A text to start from of which only a part has room."""
    text = member.prompt.start_text
    if member.prompt.init != "text" or not text:
        return
    num_tokens = len(tokenize(reading.tokenizer, [text])[0])
    if not find_method(member.prompt).stands_in_sequence:  # keys and values are those of the text as the base reads it
        num_tokens += len(special_ids(reading.tokenizer)[0])
    num_virtual = member.prompt.num_virtual_tokens
    if num_tokens > num_virtual:
        key = "text" if member.prompt.replaces_text else "init_text"
        yield (
            f"prompt.{key} has {num_tokens} tokens and the prompt {num_virtual} virtual tokens: the last "
            f"{num_tokens - num_virtual} tokens are left out"
        )


def warn_of_text(member: Config) -> Iterator[str]:
    """A text between an input that asks for the target and the target."""
    around = member.prompt.around
    template = (member.data.template or "").rstrip()
    text = around.tail().rstrip()
    if text and not around.joins and template.endswith(CUES) and not text.endswith(CUES):
        yield (
            f"prompt.text.output stands between data.template, which ends with {template[-12:]!r}, and the target: "
            "write {{ template }} at its end to have data.template last"
        )


def warn_of_start_rows(member: Config, examples: Examples) -> Iterator[str]:
    """Rows to start from of which only a part has room."""
    count = getattr(member.prompt, "init_rows", None)
    if count is None or count > len(examples):
        return
    num_tokens = int(examples.lengths_in(slice(0, count)).sum())
    num_virtual = member.prompt.num_virtual_tokens
    if num_tokens > num_virtual:
        yield (
            f"prompt.init_rows: the first {count} rows have {num_tokens} tokens and the prompt {num_virtual} "
            f"positions: the last {num_tokens - num_virtual} tokens are left out"
        )


def warn_of_cut_example(member: Config, examples: Examples) -> Iterator[str]:
    """In-context examples of `cpt`, the earliest of which is cut at its beginning."""
    prompt = member.prompt
    if prompt.method != "cpt" or prompt.init != "rows" or getattr(prompt, "cpt_token_ids", None) is not None:
        return
    chunk = slice(0, prompt.num_virtual_tokens)  # a row has a token or more
    lengths = examples.lengths_in(chunk)
    if examples.numbers is not None:
        lengths = lengths - examples.num_targets[chunk]
    totals = np.cumsum(lengths)
    count = int(np.searchsorted(totals, prompt.num_virtual_tokens)) + 1
    if count > len(totals) or totals[count - 1] == prompt.num_virtual_tokens:
        return
    what = f"the first {count:,} rows have" if count > 1 else "the first row has"
    yield (
        f"prompt.num_virtual_tokens: {what} {totals[count - 1]:,} tokens and the prompt {prompt.num_virtual_tokens:,}: "
        f"the first {totals[count - 1] - prompt.num_virtual_tokens:,} tokens are left out"
    )


def warn_of_length(member: Config, num_rows: int) -> Iterator[str]:
    """Rows that are read very often, or not all of them once."""
    size = member.train.batch_size
    steps = member.train.max_steps
    epochs = steps * size / num_rows
    spent = f"train.max_steps {steps:,} is {epochs:,.1f} epochs"
    if size > num_rows:
        yield f"train.batch_size {size:,} is more than the {num_rows:,} training rows: each step repeats rows; {spent}"
    elif epochs > MANY_EPOCHS:
        yield f"{spent} of the {num_rows:,} training rows: each row is read {epochs:,.0f} times"
    elif epochs < 1:
        yield (
            f"train.max_steps {steps:,} with train.batch_size {size:,} reads only {steps * size:,} of the "
            f"{num_rows:,} training rows"
        )


def warn_of_templates(templates: tuple[Template, Template], rows: Rows) -> Iterator[str]:
    """Columns that no row has, and templates that are the same text for every row."""
    available = list(rows.columns())
    for key, template in zip(("data.template", "data.target"), templates, strict=True):
        for column in find_absent(template, available):
            hint = name_nearest(column, available)
            yield f"{key}: no row of {rows.name} has the column {column!r}" + (f"; {hint}" if hint else "")
        for name in dict.fromkeys(BRACED.findall(template.source)):
            if name in available:
                yield f"{key} has {{{name}}}, which is plain text: write {{{{ {name} }}}} for the column"
        if not template.columns:
            what = "input" if key == "data.template" else "target"
            yield f"{key} uses no column: every row has the same {what}"
    shared = find_shared(*templates, rows.read(0, 1)[0])
    if shared:
        yield f"data.template and data.target both use {', '.join(shared)}: the answer may stand in the input"


def warn_of_specials(templates: tuple[Template, Template], rows: Rows, encoding: Encoding) -> Iterator[str]:
    """Special tokens that a template writes where they are put anyway; the first row is looked at."""
    template, target = templates
    keyed = {"data.template": template, "data.target": target}
    _, (text,), (wanted,) = next(iter(render_batches(rows.first(1), keyed, 1)))
    tokenizer = encoding.tokenizer
    ids = tokenize(tokenizer, [text.replace(MARKER, "")])[0]
    tail = tokenize(tokenizer, [wanted])[0]
    start, end = encoding.specials
    before, after = encoding.targets.specials
    cases = (
        ("data.template begins", start, ids[: len(start)]),
        ("data.template ends", end, ids[-len(end) :] if end else []),
        ("data.target begins", before, tail[: len(before)]),
        ("data.target ends", after, tail[-len(after) :] if after else []),
    )
    for what, special, found in cases:
        if special and special == found:
            yield f"{what} with {tokenizer.decode(special)}, which is put there anyway: rows have it once"


def warn_of_sameness(templates: tuple[Template, Template], examples: Examples) -> Iterator[str]:
    """Inputs or targets that are all equal although they come from columns."""
    template, target = templates
    if len(examples) < 2:
        return
    if template.columns and are_equal(examples, is_target=False):
        yield f"all {len(examples):,} training rows have the same input"
    numbers = examples.numbers
    if numbers is not None:
        is_same = bool((numbers == numbers[0]).all())
    else:
        is_same = are_equal(examples, is_target=True)
    if target.columns and is_same:
        yield f"all {len(examples):,} training rows have the same target: there is nothing to learn but that one"


def are_equal(examples: Examples, *, is_target: bool) -> bool:
    """Whether the input, or the target, is the same in all examples; ends at the first chunk where one differs."""
    first = examples.target_ids(0) if is_target else examples.input_ids(0)
    for chunk in chunks_of(len(examples)):
        lengths = examples.lengths_in(chunk)
        num_targets = examples.num_targets[chunk]
        counts = num_targets if is_target else lengths - num_targets
        if not (counts == len(first)).all():
            return False
        begins = examples.offsets[chunk] + (lengths - num_targets if is_target else 0)
        if not all((examples.ids[begins + place] == token).all() for place, token in enumerate(first)):
            return False
    return True


def warn_of_validation(split: Split, evaluator: Evaluator) -> Iterator[str]:
    """Validation rows that are training rows too, or more of them than of training rows."""
    held_out = evaluator.split.examples
    num_same = count_same(split.examples, held_out)
    if num_same:
        share = f"{num_same:,} of the {len(held_out):,} validation rows"
        yield f"{share} are training rows too: the metrics are not those of unseen rows"
    if len(held_out) > len(split.examples):
        yield f"there are more validation rows ({len(held_out):,}) than training rows ({len(split.examples):,})"


def count_same(train: Examples, held_out: Examples) -> int:
    """How many validation rows have the input and the target of a training row."""
    own = np.concatenate([sketch(held_out, chunk.start, chunk.stop) for chunk in chunks_of(len(held_out))])
    sketches = np.unique(own)
    candidates = []
    for chunk in chunks_of(len(train)):
        found = sketch(train, chunk.start, chunk.stop)
        is_known = np.isin(found, sketches)
        candidates.append((chunk.start + np.flatnonzero(is_known), np.unique(found[is_known])))
    likely = np.isin(own, np.concatenate([found for _, found in candidates]))
    wanted: dict[bytes, int] = {}
    for index in np.flatnonzero(likely).tolist():
        key = row_key(held_out, index)
        wanted[key] = wanted.get(key, 0) + 1
    num_same = 0
    for rows, _ in candidates:
        if not wanted:
            break
        for index in rows.tolist():
            num_same += wanted.pop(row_key(train, index), 0)
    return num_same


def row_key(examples: Examples, index: int) -> bytes:
    """An example's tokens and target; equal for equal rows."""
    number = examples.number(index)
    ids = examples.ids[examples.offsets[index] : examples.offsets[index + 1]]
    return ids.tobytes() + f"{examples.num_targets[index]} {number}".encode()


def sketch(examples: Examples, first: int, end: int) -> np.ndarray:
    """A number for each example of a range, the same for equal ones: of its length and of some tokens."""
    lengths = examples.lengths_in(slice(first, end))
    starts = examples.offsets[first:end]
    mixed = lengths.copy()
    for part in (1, 2, 3, 4, 5, 6, 7):
        mixed = mixed * 1_000_003 + examples.ids[starts + (lengths - 1) * part // 8]
    return mixed


def warn_of_answers(reading: Reading, member: Config, evaluator: Evaluator) -> Iterator[str]:
    """Targets that an answer may not be long enough for."""
    most = member.evaluate.max_new_tokens
    if most is None or not any(metric.needs == "answers" for metric in evaluator.metrics):
        return
    examples = evaluator.split.examples
    num_longer = int((examples.num_targets > most).sum())
    longest = longest_wanted(member, evaluator.split, evaluator.references, reading)
    if num_longer and longest is not None:
        yield (
            f"evaluate.max_new_tokens {most} is less than the targets of {num_longer:,} of the {len(examples):,} "
            f"validation rows have, up to {longest}: their answers are cut; leave it out to follow the targets"
        )
