"""Worked solutions that end in a number: whether the last number is right, as PEFT's comparison of methods counts it.

That is `method_comparison/MetaMathQA` in PEFT's repository: trained on MetaMathQA, whose answers end in `The answer is:
16`, tested on GSM8K, whose answers end in `#### 16`.
"""

from collections.abc import Sequence
from fractions import Fraction

from ptune_dist.metrics.metric import Metric, References, mean

# In this order: the first one that a text has is the one that counts.
MARKERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
AROUND = " .!?$%"  # units and ends of sentences around an answer: GSM8K writes 50% as 50


def final_answer(answers: Sequence[str], references: References) -> float:
    """The share of rows whose last number, after `The answer is:` or `####`, is that of a reference. Fractions are
    numbers too; what is no number is compared letter for letter."""
    return mean(is_right(answer, accepted) for answer, accepted in zip(answers, references, strict=True))


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """An answer without any marker is wrong; a reference without one is the final answer itself."""
    found = None if find_marker(answer) is None else read_final(cut_to_final(answer))
    return found is not None and found in [read_final(cut_to_final(text)) for text in accepted]


def find_marker(text: str) -> str | None:
    """The marker that counts; whitespace and full stops at the end of a text belong to none."""
    return next((marker for marker in MARKERS if marker in text.strip().rstrip(".!?")), None)


def cut_to_final(text: str) -> str:
    """What follows the last marker; a text without one is returned whole."""
    marker = find_marker(text)
    return text if marker is None else text.strip().rstrip(".!?").rpartition(marker)[2]


def read_final(text: str) -> str | float:
    """The number that the first line of a text is; the line itself where it is none."""
    line = text.strip().split("\n", 1)[0].strip(AROUND)
    numerator, slash, denominator = line.partition("/")
    try:
        return float(Fraction(numerator.strip()) / (Fraction(denominator.strip()) if slash else 1))
    except (ValueError, ZeroDivisionError, OverflowError):
        return line


FINAL_ANSWER = Metric("final_answer", "answers", final_answer)
