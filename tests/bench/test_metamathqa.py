"""PEFT's MetaMathQA setting runs on a tiny base, with rows of the columns of MetaMathQA and of GSM8K."""

import json

from ptune_dist.cli import main
from ptune_dist.config.load import load_config
from ptune_dist.run.resolve import resolve
from tests.processes import ROOT

CONFIG = ROOT / "configs/bench/metamathqa.yaml"


def test_the_setting_trains_on_one_data_set_and_is_scored_on_the_other(tmp_path, capsys):
    train = [
        {
            "type": "GSM_Rephrased",
            "query": f"{i} + 1?",
            "response": f"{i} + 1 = {i + 1}.\n#### {i + 1}\nThe answer is: {i + 1}",
        }
        for i in range(16)
    ]
    test = [{"question": f"{i} + 2?", "answer": f"{i} + 2 = {i + 2}.\n#### {i + 2}"} for i in range(3)]
    for name, rows in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [
        *(f"model.path={ROOT}/configs/tiny/causal", "model.dtype=float32", f"output_dir={tmp_path}/run"),
        *(f"data.train={tmp_path}/train.jsonl", "data.cache_dir=off", "train.max_steps=2", "train.warmup_steps=1"),
        *("evaluate.max_new_tokens=8", "checkpoint.every=0", "data.max_length=200"),
    ]
    assert main(["train", str(CONFIG), *small]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "no row of" in line]
    assert ["'question'" in warnings[0], "'answer'" in warnings[1]] == [True, True]  # GSM8K's columns
    assert main(["evaluate", str(tmp_path / "run"), f"data.validation={tmp_path}/test.jsonl"]) == 0
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["num_examples"] == 3 and found["final_answer"] == 0.0 and found["loss"] > 0
    assert found["samples"][0]["input"].startswith("Question: 0 + 2? Think step by step.")


def test_the_setting_is_that_of_peft():
    config = load_config(CONFIG, resolve=resolve)
    assert (config.train.max_steps, config.train.batch_size, config.train.learning_rate) == (5000, 4, 0.005)
    assert (config.prompt.method, config.prompt.num_virtual_tokens, config.data.max_length) == (
        "prefix_tuning",
        50,
        768,
    )
