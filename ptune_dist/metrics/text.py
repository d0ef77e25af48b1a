"""Generated texts against reference answers: letter for letter, or as SQuAD's evaluation compares them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ptune_dist.metrics.metric import Metric, References, mean

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answers: Sequence[str], references: References) -> float:
    """The share of rows whose answer is one of their references, letter for letter."""
    return mean(answer in accepted for answer, accepted in zip(answers, references, strict=True))


def f1(answers: Sequence[str], references: References) -> float:
    """SQuAD's F1: the overlap of words with the most similar reference, averaged over rows."""
    return mean_of_best(overlap, answers, references)


def squad_em(answers: Sequence[str], references: References) -> float:
    """SQuAD's exact match: the share of rows whose answer equals a reference once both are normalized."""
    return mean_of_best(lambda answer, reference: float(answer == reference), answers, references)


def mean_of_best(score: Callable[[str, str], float], answers: Sequence[str], references: References) -> float:
    """The mean over rows of the best score among a row's references, of normalized texts."""
    return mean(
        max(score(normalize(answer), normalize(reference)) for reference in accepted)
        for answer, accepted in zip(answers, references, strict=True)
    )


def normalize(text: str) -> str:
    """As SQuAD v1.1's evaluation script does: lower case, no punctuation, no articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def overlap(answer: str, reference: str) -> float:
    """F1 of the words of two normalized texts; where either has none, whether both have none, as in SQuAD v2.0."""
    words = answer.split()
    wanted = reference.split()
    if not words or not wanted:
        return float(words == wanted)
    num_common = (Counter(words) & Counter(wanted)).total()
    return 2 * num_common / (len(words) + len(wanted))


EXACT_MATCH = Metric("exact_match", "answers", exact_match, is_mean=True)
F1 = Metric("f1", "answers", f1, is_mean=True)
SQUAD_EM = Metric("squad_em", "answers", squad_em, is_mean=True)
