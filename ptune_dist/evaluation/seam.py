"""Where an input meets its target: what `validate` finds there.

Input and target are tokenized apart, because generation sees the input alone. Where the tokenizer would merge them as
one text, the target begins in a way that the base has hardly ever read.
"""

from collections.abc import Iterator

from ptune_dist.config.schema import Config
from ptune_dist.data.build import Split, build_templates
from ptune_dist.data.framing import tokenize
from ptune_dist.data.template import MARKER, render_batches
from ptune_dist.evaluation.splits import RunRows
from ptune_dist.run.reading import Reading

MOST_ROWS = 1000  # that are looked at


def describe_seams(reading: Reading, read: RunRows) -> list[str]:
    """What is found in the members' training rows; what several share is named once."""
    found: dict[str, None] = {}
    for name, member in reading.members.items():
        found |= dict.fromkeys(describe_seam(reading, member, read.splits[name]))
    return list(found)


def describe_seam(reading: Reading, member: Config, split: Split) -> Iterator[str]:
    """A line where tokens would merge, and one where an instruct base is not asked as a chat."""
    data = member.data
    if split.rows.kind == "text" or reading.family.name != "causal" or reading.objective.target != "text":
        return
    if reading.tokenizer.chat_template and not data.is_chat:
        yield (
            "the base has a chat template, so it was trained on chats: data.chat=true writes data.template and "
            "data.target as a user's and an assistant's turn"
        )
    if data.is_chat or data.labels and not reading.encoding(member).targets.takes_room:
        return
    rows = split.rows.first(MOST_ROWS)
    template, target = build_templates(data, member.prompt.placement, member.prompt.around)
    keyed = {"data.template": template, "data.target": target}
    num_merged = 0
    example = ("", "")
    for _, inputs, texts in render_batches(rows, keyed, MOST_ROWS):
        ends = [text.rpartition(MARKER)[2] for text in inputs]
        own = tokenize(reading.tokenizer, ends)
        whole = tokenize(reading.tokenizer, [end + text for end, text in zip(ends, texts, strict=True)])
        for end, text, ids, joined in zip(ends, texts, own, whole, strict=True):
            if end and joined[: len(ids)] != ids:
                example = example if num_merged else (end, text)
                num_merged += 1
    if num_merged:
        yield (
            f"{num_merged:,} of {len(rows):,} rows: as one text, the end of the input and the beginning of the target "
            f"would be one token ({example[0][-12:]!r} and {example[1][:12]!r}): {advise(*example)}"
        )


def advise(before: str, after: str) -> str:
    """What to move from one template to the other."""
    if before != before.rstrip():
        return "move the space at the end of data.template to the beginning of data.target"
    return "end data.template, or begin data.target, with a space or a line break"
