"""Metrics of generated texts, against their reference implementations."""

import re
import string
from collections import Counter

import pytest

from ptune_dist.metrics import METRICS

ROWS = [  # answer, references
    ("The Denver Broncos!", ["Denver Broncos", "Broncos"]),
    ("an  old\tdog", ["old dog"]),
    ("the quick brown fox", ["a quick red fox", "brown"]),
    ("U.S.A.", ["usa"]),
    ("theater", ["ater"]),
    ("1,000 men", ["1000", "two"]),
    ("yes yes no", ["yes no no"]),
    ("nothing alike", ["something else"]),
]


def test_exact_match_takes_any_of_a_row_s_references_letter_for_letter():
    references = [["Denver", "Denver Broncos"], ["Denver", "Denver Broncos"], ["Paris"], ["Paris"]]
    assert METRICS["exact_match"].compute(["Denver Broncos", "denver", "Paris", "Paris."], references) == 0.5


# What follows is the evaluation script of SQuAD v1.1, evaluate-v1.1.py, as its authors wrote it.


def normalize_answer(s):
    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text):
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def f1_score(prediction, ground_truth):
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = Counter(prediction_tokens) & Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def exact_match_score(prediction, ground_truth):
    return normalize_answer(prediction) == normalize_answer(ground_truth)


@pytest.mark.parametrize(("name", "score"), [("f1", f1_score), ("squad_em", exact_match_score)])
def test_squad_s_metrics_are_those_of_its_script(name, score):
    best = [max(score(answer, reference) for reference in references) for answer, references in ROWS]
    answers, references = zip(*ROWS, strict=True)
    assert METRICS[name].compute(answers, references) == pytest.approx(sum(best) / len(best), rel=1e-12)
    for answer, accepted in ROWS:
        expected = float(max(score(answer, reference) for reference in accepted))
        assert METRICS[name].compute([answer], [accepted]) == pytest.approx(expected, rel=1e-12), answer


def test_squad_s_metrics_have_the_values_worked_out_by_hand():
    assert METRICS["squad_em"].compute(["The Denver Broncos!"], [["Broncos", "Denver Broncos"]]) == 1
    assert METRICS["f1"].compute(["the quick brown fox"], [["a quick red fox", "brown"]]) == pytest.approx(2 / 3)
    assert METRICS["f1"].compute(["x", "y"], [["x"], ["z"]]) == 0.5


@pytest.mark.parametrize(("answer", "reference", "score"), [("", "", 1), ("the", "", 1), ("", "x", 0), ("x", "", 0)])
def test_an_answer_without_words_is_right_where_none_is_wanted(answer, reference, score):
    assert METRICS["f1"].compute([answer], [[reference]]) == score
