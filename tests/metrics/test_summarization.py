"""ROUGE has the values that rouge-score's own tests and the documentation of Hugging Face's `evaluate` show."""

import pytest

from ptune_dist.metrics import METRICS


def test_rouge_is_rouge_score_s():
    # rouge_scorer_test.py: testRouge1, testRouge2, testRougeL.
    assert METRICS["rouge1"].compute(["testing"], [["testing one two"]]) == pytest.approx(1 / 2)
    assert METRICS["rouge2"].compute(["testing one"], [["testing one two"]]) == pytest.approx(2 / 3)
    assert METRICS["rougeL"].compute(["testing one"], [["testing one two"]]) == pytest.approx(4 / 5)


@pytest.mark.parametrize(("name", "score"), [("rouge1", 0.8333333333), ("rouge2", 0.5), ("rougeL", 0.8333333333)])
def test_the_best_of_several_references_counts(name, score):
    # The example with several references of evaluate's ROUGE.
    references = [["hello", "there"], ["general kenobi", "general yoda"]]
    assert METRICS[name].compute(["hello there", "general kenobi"], references) == pytest.approx(score)


def test_words_are_not_stemmed_and_case_does_not_matter():
    assert METRICS["rouge1"].compute(["Testing"], [["testing"]]) == 1
    assert METRICS["rouge1"].compute(["tested"], [["testing"]]) == 0
