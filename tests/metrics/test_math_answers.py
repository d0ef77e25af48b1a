"""The final number of worked solutions, on answers of MetaMathQA's and GSM8K's forms."""

import pytest

from ptune_dist.metrics import METRICS

RIGHT = [  # answer, reference
    ("4^2 = 16, so $\\boxed{16}$.The answer is: 16", "She has 4 * 4 = <<4*4=16>>16.\n#### 16"),
    ("The answer is: 16.", "#### 16"),
    ("#### 16", "The answer is: 16"),
    ("The answer is: $16.50", "#### 16.5"),
    ("The answer is: 50%", "#### 50"),
    ("The answer is: 20/35", "#### 0.5714285714285714"),
    ("The answer is: -3\n\nQuestion: How much is 4?", "#### -3"),
    ("The answer is: 4, no. The answer is: 5", "#### 5"),
    ("So 7 + 1 = 8. The final answer is 8", "#### 8"),
    ("The answer is: x^2 + 1", "The answer is: x^2 + 1"),
    ("The answer is: 16", "16"),
    ("The answer is: 0", "#### 0"),
]
WRONG = [
    ("16", "#### 16"),  # no final answer is marked
    ("", "#### 16"),
    ("The answer is:", "#### 16"),
    ("The answer is: 17", "#### 16"),
    ("The answer is: sixteen", "#### 16"),
    ("The answer is: 1/0", "#### 1"),
    ("The answer is: 1,000", "#### 1000"),  # as in PEFT
    ("The answer is 7, or: The final answer is 8", "#### 8"),
    ("The answer is: 4. #### 16", "#### 16"),  # what MetaMathQA's marker is followed by comes first
]


@pytest.mark.parametrize(
    ("answer", "reference", "score"), [(*pair, 1) for pair in RIGHT] + [(*pair, 0) for pair in WRONG]
)
def test_the_last_number_after_a_marker_counts(answer, reference, score):
    assert METRICS["final_answer"].compute([answer], [[reference]]) == score


def test_the_score_is_the_share_of_rows_and_any_reference_will_do():
    answers = ["The answer is: 1", "The answer is: 2", "3", "#### 4"]
    assert METRICS["final_answer"].compute(answers, [["#### 1"], ["#### 3", "#### 2"], ["3"], ["#### 5"]]) == 0.5
