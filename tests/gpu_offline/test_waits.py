"""A training step on a GPU seldom waits for it: the host reads what it must know, and nothing else."""

import pytest

from tests.gpu_offline.faked import run_faked

pytestmark = pytest.mark.long

MOST_WAITS = 3
CASES = [
    {"placement": "prefix", "method": "prompt_tuning", "precision": "bfloat16"},
    {"placement": "prefix", "method": "prefix_tuning", "precision": "float16"},
    {"placement": "infix", "method": "prompt_tuning", "precision": "bfloat16"},
]


@pytest.fixture(scope="module")
def steps() -> list[dict]:
    return run_faked("tests.gpu_offline.work_steps:count_waits", CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(CASES[number].values()))
def test_the_host_waits_for_the_gpu_at_most_three_times_a_step(steps, number):
    step = steps[number]
    assert step["micro_batches"] >= 3  # none of which waits
    assert 1 <= sum(step["waits"].values()) <= MOST_WAITS, step["waits"]
