"""What is right for rows that are answered, where they say so, and the scores of answers."""

import json

import pytest

from ptune_dist.config.schema import DataConfig, EvaluateConfig
from ptune_dist.data.sources import load_rows
from ptune_dist.evaluation.row_scores import add_scores, build_row_scores


@pytest.fixture
def score(tmp_path):
    """What is added to the answers of some rows."""

    def score_rows(rows: list[dict], answers: list[str], metrics: list[str], *, chooses: bool = False, **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(train=str(file), **{"template": "{{ q }}", "target": " {{ a }}"} | options)
        loaded = load_rows(str(file), key="--input-file", default_split="test")
        scores = build_row_scores(data, EvaluateConfig(metrics=metrics), loaded, chooses_label=chooses)
        found = [add_scores(scores, loaded, number, {"generated": answer}) for number, answer in enumerate(answers)]
        return [{key: value for key, value in row.items() if key not in rows[0]} for row in found]

    return score_rows


def test_a_row_that_has_a_target_has_it_and_the_means_over_rows(score):
    rows = [{"q": "x", "a": "A b"}, {"q": "y", "a": "C"}]
    metrics = ["loss", "exact_match", "f1", "bleu", "accuracy"]
    assert score(rows, ["A b", "c d"], metrics) == [
        {"generated": "A b", "gold": "A b", "exact_match": 1.0, "f1": 1.0},
        {"generated": "c d", "gold": "C", "exact_match": 0.0, "f1": pytest.approx(2 / 3)},
    ]


def test_rows_that_say_nothing_of_what_is_right_are_answered_alone(score):
    assert score([{"q": "x"}], ["A"], ["exact_match"]) == [{"generated": "A"}]
    rows = [{"q": "x", "a": "A"}, {"q": "y", "a": None}]
    assert [sorted(row) for row in score(rows, ["A", "A"], ["exact_match"])] == [
        ["exact_match", "generated", "gold"],
        ["generated"],
    ]


def test_the_best_of_several_references_counts(score):
    rows = [{"q": "x", "a": {"text": ["A", "B"]}}]
    keys = {"target": " {{ a.text }}", "references": "a.text"}
    assert score(rows, ["B"], ["exact_match"], **keys) == [{"generated": "B", "gold": ["A", "B"], "exact_match": 1.0}]


def test_labels_and_numbers(score):
    rows = [{"q": "x", "a": 1}]
    keys = {"target": " {{ ['bad', 'good'][a] }}", "labels": ["0", "1"]}
    assert score(rows, ["1"], ["accuracy"], chooses=True, **keys) == [
        {"generated": "1", "gold": "good", "gold_label": "1", "accuracy": 1.0}
    ]
    assert score([{"q": "x", "a": 1.5}], ["2"], ["mse"]) == [{"generated": "2", "gold": "1.5", "mse": 0.25}]


def test_a_conversation_that_ends_with_an_answer_says_it(score):
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": " ONE "}]
    keys = {"messages": "talk", "template": None, "target": None}
    assert score([{"talk": talk}], ["ONE"], ["exact_match"], **keys) == [
        {"generated": "ONE", "gold": "ONE", "exact_match": 1.0}
    ]
    assert score([{"talk": talk[:1]}], ["ONE"], ["exact_match"], **keys) == [{"generated": "ONE"}]


def test_columns_that_are_named_as_results_are_kept_under_other_names(score):
    rows = [{"q": "x", "a": "A"}, {"q": "y", "a": "B", "generated": 1, "row_generated": 2, "gold": 3}]
    assert score(rows, ["A", "B"], [])[1] == {
        "generated": "B", "gold": "B", "row_row_generated": 1, "row_generated": 2, "row_gold": 3
    }  # fmt: skip
