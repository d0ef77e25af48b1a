"""Both sides of the shipped benchmark train the same and report the same measures."""

import json

import pytest

from ptune_dist.base.source import load_shape, load_tokenizer
from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from tests.commands import run_module
from tests.processes import ROOT

OVERRIDES = [
    "data.validation=null",
    "train.batch_size=8",
    "train.max_steps=6",
    "evaluate.every=0",
    "evaluate.metrics=[loss]",
    "checkpoint.every=0",
]


@pytest.mark.extended
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_ours_and_the_peer_have_one_loss_curve_and_report_the_same_measures(tmp_path, method):
    rows = (ROOT / "configs/tiny/data/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:8]))  # every step sees all rows, in whatever order
    found = {}
    for side, options in (("ours", []), ("peft_trainer", ["--micro-batch-size", "2", "--log-steps", "1"])):
        result = tmp_path / f"{side}.json"
        done = run_module(
            f"ptune_dist.bench.{side}",
            str(ROOT / "configs/quickstart.yaml"),
            f"data.train={tmp_path}/train.jsonl",
            *OVERRIDES,
            f"prompt.method={method}",
            *(["prompt.init=random"] if method == "prefix_tuning" else []),
            f"output_dir={tmp_path}/{side}",
            *options,
            "--result",
            str(result),
            num_ranks=2,
        )
        assert done.returncode == 0, done.stderr
        found[side] = json.loads(result.read_text())
    ours = found["ours"]
    peer = found["peft_trainer"]
    assert ours["loss_curve"] == pytest.approx(peer["loss_curve"], abs=1e-4)
    assert len(ours["loss_curve"]) == ours["steps"] == peer["steps"] == 6
    for name in ("rows_timed", "tokens_timed", "world_size"):
        assert ours[name] == peer[name]
    assert set(ours) == set(peer) - {"micro_batch_size"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt.method=p_tuning", "prompt.init=random"], "prompt.method: the peer supports prompt_tuning and prefix"),
        (["prompt.method=prefix_tuning", "prompt.from_layer=1"], "without further options"),
        (
            ["prompt.method=prefix_tuning", "prompt.init=text", "prompt.init_text=Rate it."],
            "prompt.init: the peer does",
        ),
    ],
)
def test_the_peer_refuses_what_peft_would_train_in_another_way(overrides, message):
    from ptune_dist.bench.peft_trainer import build_model

    config = load_config(ROOT / "configs/quickstart.yaml", ["prompt.init_text=null", *overrides])
    tokenizer = load_tokenizer(config.model.path, load_shape(config.model.path))
    with pytest.raises(UserError, match=message):
        build_model(config, tokenizer)
