"""Translations against reference translations, by sacrebleu (Post, 2018, arXiv:1804.08771), from 0 to 100."""

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, cast

from ptune_dist.metrics.metric import Interval, Metric, References


def bleu(answers: Sequence[str], references: References) -> float:
    """BLEU of the whole corpus, with sacrebleu's defaults: case matters, the 13a tokenizer, exponential smoothing."""
    return build_bleu(references).corpus_score(answers, None).score


def sign_bleu(references: References) -> str:
    return str(build_bleu(references).get_signature())


def build_bleu(references: References) -> Any:
    """A scorer of answers to rows with these references."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(references=to_streams(references), force=True)  # force: no warning about text that looks tokenized


def chrf(answers: Sequence[str], references: References) -> float:
    """chrF2 of the whole corpus, with sacrebleu's defaults: characters in runs of up to 6, no words.

    Unlike BLEU it needs no tokenizer, so it suits languages that write no spaces.
    """
    return build_chrf(references).corpus_score(answers, None).score


def sign_chrf(references: References) -> str:
    return str(build_chrf(references).get_signature())


def build_chrf(references: References) -> Any:
    """A scorer of answers to rows with these references."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(references=to_streams(references))


def bleu_interval(answers: Sequence[str], references: References, num_resamples: int) -> Interval:
    return resample(build_bleu(references), answers, num_resamples)


def chrf_interval(answers: Sequence[str], references: References, num_resamples: int) -> Interval:
    return resample(build_chrf(references), answers, num_resamples)


def resample(scorer: Any, answers: Sequence[str], num_resamples: int) -> Interval:
    """sacrebleu's 95% interval, which it computes from the counts of each row."""
    score = scorer.corpus_score(answers, None, n_bootstrap=num_resamples)
    found = json.loads(score.format(width=6, is_json=True, signature=str(scorer.get_signature())))
    if "confidence_mean" not in found:  # it is 0 in all resamples
        return score.score, score.score
    return found["confidence_mean"] - found["confidence_var"], found["confidence_mean"] + found["confidence_var"]


def bleu_p_value(first: Sequence[str], second: Sequence[str], references: References, num_resamples: int) -> float:
    return compare(build_bleu(references), first, second, num_resamples)


def chrf_p_value(first: Sequence[str], second: Sequence[str], references: References, num_resamples: int) -> float:
    return compare(build_chrf(references), first, second, num_resamples)


def compare(scorer: Any, first: Sequence[str], second: Sequence[str], num_resamples: int) -> float:
    """sacrebleu's paired bootstrap test."""
    from sacrebleu.significance import PairedTest

    systems: list[tuple[str, Sequence[str]]] = [("first", first), ("second", second)]
    test = PairedTest(systems, {"score": scorer}, None, test_type="bs", n_samples=num_resamples)
    _, found = cast(Any, test())  # its annotated type is that of other values
    (of_both,) = [results for name, results in found.items() if name != "System"]
    return of_both[1].p_value


def to_streams(references: References) -> list[tuple[str, ...]]:
    """References as sacrebleu takes them: all first ones, all second ones, ..., None where a row has no more."""
    return cast(list[tuple[str, ...]], list(zip_longest(*references)))  # sacrebleu's own type leaves out the None


BLEU = Metric(
    "bleu",
    "answers",
    bleu,
    package="sacrebleu",
    module="sacrebleu",
    signature=sign_bleu,
    interval=bleu_interval,
    p_value=bleu_p_value,
)
CHRF = Metric(
    "chrf",
    "answers",
    chrf,
    package="sacrebleu",
    module="sacrebleu",
    signature=sign_chrf,
    interval=chrf_interval,
    p_value=chrf_p_value,
)
