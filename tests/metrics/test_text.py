"""Metrics of generated texts, against their reference implementations."""

from ptune_dist.metrics import METRICS


def test_exact_match_takes_any_of_a_row_s_references_letter_for_letter():
    references = [["Denver", "Denver Broncos"], ["Denver", "Denver Broncos"], ["Paris"], ["Paris"]]
    assert METRICS["exact_match"].compute(["Denver Broncos", "denver", "Paris", "Paris."], references) == 0.5
