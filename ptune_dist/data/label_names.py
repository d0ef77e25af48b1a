"""What a value that `data.labels` does not list differs by."""

import unicodedata
from collections.abc import Sequence

from ptune_dist.data.json_values import text_of
from ptune_dist.data.numbers import read_number

MOST_SHOWN = 10


def describe_unlisted(
    where: str, column: str, value: object, labels: Sequence[str], *, key: str = "data.labels"
) -> str:
    """A message about a row's value that is none of the labels: the labels, and by what it misses one, if so."""
    shown_value = text_of(value) if isinstance(value, bool) else repr(value)
    shown = ", ".join(map(show_label, labels[:MOST_SHOWN]))
    if len(labels) > MOST_SHOWN:
        shown += f", ... ({len(labels)} labels)"
    return f"{where}: {column} is {shown_value}, which {key} does not list: {shown}{describe_near(value, labels)}"


def show_label(label: str) -> str:
    """A label, in quotes where it could be read as something else."""
    return label if label == label.strip() and label.isprintable() and "," not in label and label else repr(label)


def describe_near(value: object, labels: Sequence[str]) -> str:
    """By what a value differs from the label that it was perhaps meant to be; empty where it is like none."""
    text = text_of(value)
    for label in labels:
        if " ".join(label.split()) == " ".join(text.split()):
            return f"; it differs from {label!r} by whitespace only: clean the rows, or list it as {text!r}"
    for label in labels:
        if letters_of(label) == letters_of(text):
            return (
                f"; it differs from {label!r} by Unicode characters that look alike or are invisible: {ascii(text)} is "
                f"not {ascii(label)}: normalize the rows, or list it as it is"
            )
    for label in labels:
        if label.strip().casefold() == text.strip().casefold():
            return f"; it differs from {label!r} by upper and lower case: list it as {text!r}"
    for label in labels:
        if as_number(label) is not None and as_number(label) == as_number(value):
            return f"; it is the same number as {label!r}, but of another type: list it as {text!r}"
    return ""


def letters_of(text: str) -> str:
    """A text without invisible characters, in the one form that Unicode has for texts that look alike."""
    seen = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", seen).strip()


def as_number(value: object) -> float | None:
    """A number, or a text that is one, true or false, as a number."""
    words = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
    text = text_of(value).strip()
    return words[text.casefold()] if text.casefold() in words else read_number(text)
