"""A prompt that starts from what the base computes of a text gathers no more of a sharded base than a pass does."""

import json

from tests.commands import run_module
from tests.conftest import build_tiny_base
from tests.processes import ROOT

NUM_RANKS = 2


def test_a_start_from_a_text_gathers_a_few_layers_at_once(tmp_path):
    base = build_tiny_base("llama", tmp_path / "llama", num_hidden_layers=8)
    done = run_module(str(ROOT / "tests" / "zero" / "starts_many.py"), str(tmp_path), str(base), num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    for rank in range(NUM_RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for case, sizes in found.items():
            assert sizes["difference"] < 1e-5, case
            # One that computes and what is gathered ahead of the next ones.
            allowed = sizes["embeddings"] + 3 * sizes["layer"]
            assert sizes["layer"] <= sizes["most"] <= allowed < 0.7 * sizes["base"], (case, sizes)
