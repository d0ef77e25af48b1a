"""A run goes on only with the config it began with, and a finished one is left alone."""

from pathlib import Path

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.errors import UserError
from ptune_dist.run.folder import (
    check_run_dir,
    find_member_dir,
    is_finished,
    lock_run_dir,
    read_run_config,
    read_summary,
    write_json,
    write_run_configs,
)
from tests.conftest import write_config


def claim(config) -> None:
    """As a run begins."""
    with lock_run_dir(config):
        write_run_configs(config, expand_sweep(config))


@pytest.fixture
def load(tmp_path):
    path = write_config(tmp_path / "c.yaml")
    return lambda *overrides: load_config(path, list(overrides))


@pytest.fixture
def begun(load) -> Config:
    """The config of a run that has a checkpoint."""
    config = load()
    claim(config)
    (Path(config.output_dir) / "checkpoints").mkdir()
    return config


def test_a_folder_without_a_run_may_be_used_and_one_whose_start_failed_too(load):
    check_run_dir(load())
    claim(load())
    check_run_dir(load("train.learning_rate=0.9", "train.resume=never"))


def test_the_config_that_a_run_keeps_is_the_one_it_was_begun_with(begun):
    assert read_run_config(Path(begun.output_dir)) == begun
    assert read_run_config(Path(begun.output_dir), ["evaluate.every=7"]).evaluate.every == 7


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: not a run"):
        read_run_config(tmp_path)


def test_the_same_config_may_go_on(begun, load):
    check_run_dir(load())


def test_every_member_of_a_sweep_keeps_the_config_that_it_would_have_alone(load):
    config = load("sweep={seed: [0, 1]}")
    claim(config)
    assert read_run_config(Path(config.output_dir)) == config
    for name, member in expand_sweep(config).items():
        assert read_run_config(Path(config.output_dir) / "members" / name) == member
        assert (member.sweep, member.seed) == (None, int(name[-1]))


@pytest.mark.parametrize(
    ("begun_with", "then"),
    [(None, "{seed: [0, 1]}"), ("{seed: [0, 1]}", "{seed: [1, 0]}"), ("{seed: [0, 1]}", "{seed: [0, 1, 2]}"),
     ("{seed: [0, 1], train.learning_rate: [0.1]}", "{train.learning_rate: [0.1], seed: [0, 1]}")],
)  # fmt: skip
def test_a_run_goes_on_with_the_members_that_it_began_with_in_their_order(load, begun_with, then):
    config = load(f"sweep={begun_with or 'null'}")
    claim(config)
    (Path(config.output_dir) / "checkpoints").mkdir()
    check_run_dir(config)
    with pytest.raises(UserError, match="this run began with sweep"):
        check_run_dir(load(f"sweep={then}"))


def test_a_sweeps_folder_is_that_of_the_best_member_or_of_the_one_named(load):
    config = load("sweep={seed: [0, 1]}")
    claim(config)
    run_dir = Path(config.output_dir)
    assert find_member_dir(run_dir, "seed=1") == run_dir / "members" / "seed=1"
    with pytest.raises(UserError, match="a sweep that has not ended has no best member"):
        find_member_dir(run_dir, None)
    with pytest.raises(UserError, match="--member: seed=7 is none of seed=0, seed=1"):
        find_member_dir(run_dir, "seed=7")
    write_json(run_dir / "summary.json", {"ranking": [{"member": "seed=1"}, {"member": "seed=0"}]})
    assert find_member_dir(run_dir, None) == run_dir / "members" / "seed=1"


def test_a_run_without_a_sweep_has_no_members(begun):
    assert find_member_dir(Path(begun.output_dir), None) == Path(begun.output_dir)
    with pytest.raises(UserError, match="is no sweep"):
        find_member_dir(Path(begun.output_dir), "seed=0")


def test_a_sweep_is_finished_when_no_member_goes_on(load):
    config = load("sweep={seed: [0, 1]}", "data.validation=x.jsonl", "evaluate.patience=1")
    claim(config)
    summary = {"steps": 7, "evaluations_since_best": 1, "ranking": [{"ended": "weaker"}, {"ended": None}]}
    write_json(Path(config.output_dir) / "summary.json", summary)
    assert is_finished(config) is None
    summary["ranking"][1]["ended"] = "no better"
    write_json(Path(config.output_dir) / "summary.json", summary)
    assert is_finished(config)["steps"] == 7


@pytest.mark.parametrize(
    "override",
    ["train.max_steps=99", "train.micro_batch_tokens=77", "evaluate.every=3", "evaluate.metrics=[exact_match]",
     "checkpoint.keep=7", "train.context_cache_dir=null", "deepspeed={zero_optimization: {stage: 2}}"],
)  # fmt: skip
def test_what_does_not_change_what_is_learned_may_change(begun, load, override):
    check_run_dir(load(override))


@pytest.mark.parametrize(
    "override, key",
    [
        ("train.learning_rate=0.9", "train.learning_rate 0.05, not 0.9"),
        ("seed=3", "seed 0, not 3"),
        ("train.batch_size=4", "train.batch_size"),
        ("prompt.num_virtual_tokens=9", "prompt.num_virtual_tokens"),
        ("data.template='{{ word }}:'", "data.template"),
        ("model.dtype=bfloat16", "model.dtype"),
        ("train.schedule=constant", "train.schedule"),
    ],
)
def test_what_changes_what_is_learned_is_refused_with_the_key_and_both_values(begun, load, override, key):
    with pytest.raises(UserError) as caught:
        check_run_dir(load(override))
    assert key in str(caught.value) and begun.output_dir in str(caught.value)


def test_resume_never_refuses_a_folder_that_holds_a_run(begun, load):
    with pytest.raises(UserError, match="output_dir.*train.resume"):
        check_run_dir(load("train.resume=never"))


def test_a_run_is_finished_when_its_summary_says_so(begun, load):
    folder = Path(begun.output_dir)
    assert is_finished(begun) is None
    write_json(folder / "summary.json", {"steps": 20, "evaluations_since_best": 0})
    assert is_finished(begun)["steps"] == 20
    assert is_finished(load("train.max_steps=10"))
    assert is_finished(load("train.max_steps=21")) is None
    write_json(folder / "summary.json", {"steps": 7, "evaluations_since_best": 2})
    patient = ["data.validation=x.jsonl", "evaluate.patience=2"]
    assert is_finished(load(*patient))["steps"] == 7
    assert is_finished(load(patient[0], "evaluate.patience=3")) is None
    assert is_finished(begun) is None


def test_a_summary_that_cannot_be_read_is_none(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"steps": ')
    assert read_summary(tmp_path) is None


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, load):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match=f"output_dir: {tmp_path}/{name}: "):
            claim(load(f"output_dir={tmp_path}/{name}"))
