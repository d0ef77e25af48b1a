"""Partitions that are not DeepSpeed's own end in one clear message before anything is loaded."""

import json

import pytest

from tests.commands import run_module
from tests.processes import ROOT

NUM_RANKS = 2
SAYS = {
    "Pads": "ds_tensor: ",
    "PadsOneRank": "ds_tensor: ",
    "Misplaces": "what it gathers is not what was cut",
    "ForgetsAField": "attributes ds_numel_aligned",
    "ForgetsAFieldOfThePart": "ds_tensor: attributes final_location",
    "Miscounts": "ds_numel_aligned is 8, not 9",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank found."""
    out = tmp_path_factory.mktemp("layouts")
    done = run_module(str(ROOT / "tests" / "zero" / "layout_many.py"), str(out), num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def test_this_release_of_deepspeed_cuts_as_we_do(ranks):
    assert [rank["Sharder"] for rank in ranks] == [""] * NUM_RANKS


@pytest.mark.parametrize("kind", SAYS)
def test_every_rank_says_what_differs(ranks, kind):
    for rank in ranks:
        assert SAYS[kind] in rank[kind] and "install a release that pyproject.toml allows" in rank[kind]
        assert rank[kind].startswith("DeepSpeed 0.") and "\n" not in rank[kind]
