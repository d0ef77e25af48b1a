"""Summaries against reference summaries, by rouge-score (Lin, 2004), from 0 to 1.

The mean over rows of the F-measure with the reference that fits best, without stemming, as Hugging Face's `evaluate`
has it. rouge-score's words are runs of a-z and 0-9: texts in other scripts have none and score 0.
"""

from collections.abc import Sequence
from functools import partial

from ptune_dist.metrics.metric import Metric, References, mean


def rouge(kind: str, answers: Sequence[str], references: References) -> float:
    """ROUGE's F1 with the most similar reference: of words (rouge1), pairs (rouge2), the longest sequence (rougeL).

    kind: rouge-score's name.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=False)
    return mean(
        scorer.score_multi(accepted, answer)[kind].fmeasure
        for answer, accepted in zip(answers, references, strict=True)
    )


def build_rouge(kind: str) -> Metric:
    return Metric(kind, "answers", partial(rouge, kind), package="rouge-score", module="rouge_score", is_mean=True)


ROUGE_1 = build_rouge("rouge1")
ROUGE_2 = build_rouge("rouge2")
ROUGE_L = build_rouge("rougeL")
