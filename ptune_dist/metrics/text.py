"""Generated texts against the texts that were wanted."""

from collections.abc import Sequence

from ptune_dist.metrics.metric import Metric, References, mean


def exact_match(answers: Sequence[str], references: References) -> float:
    """The share of rows whose answer is one of their references, letter for letter."""
    return mean(answer in accepted for answer, accepted in zip(answers, references, strict=True))


EXACT_MATCH = Metric("exact_match", "answers", exact_match)
