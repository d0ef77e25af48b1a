"""A run is resumed only with the config that it was started with, and a finished run is left alone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.errors import UserError
from ptune_dist.run import folder
from ptune_dist.run.folder import (
    check_run_dir,
    find_member_dir,
    is_finished,
    is_locked,
    lock_run_dir,
    read_run_config,
    read_summary,
    wait_to_see,
    write_json,
    write_run_configs,
)
from ptune_dist.run.resolve import resolve
from tests.conftest import write_config

Load = Callable[..., Config]


def claim(config: Config) -> None:
    """Lock the directory and write the configs, as at the start of a run."""
    with lock_run_dir(config):
        write_run_configs(config, expand_sweep(config))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    path = write_config(tmp_path / "c.yaml")
    return lambda *overrides: load_config(path, list(overrides))


@pytest.fixture
def started(load: Load) -> Config:
    """The config of a run that has a checkpoint."""
    config = load()
    claim(config)
    (Path(config.output_dir) / "checkpoints").mkdir()
    return config


def test_a_directory_without_a_run_may_be_used_as_may_that_of_a_failed_start(load: Load):
    check_run_dir(load())
    claim(load())
    check_run_dir(load("train.learning_rate=0.9", "train.resume=never"))


def test_a_run_keeps_the_config_that_it_was_started_with(started: Config):
    assert read_run_config(Path(started.output_dir)) == started
    assert read_run_config(Path(started.output_dir), ["evaluate.every=7"]).evaluate.every == 7


def test_a_directory_that_is_not_a_run_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=f"{tmp_path}: not a run"):
        read_run_config(tmp_path)


def test_what_the_method_decides_is_compared_once_it_has(load: Load):
    """The launcher compares configs before torch, and with it the methods, is imported."""
    undecided = load()
    started = resolve(undecided)
    claim(started)
    (Path(started.output_dir) / "checkpoints").mkdir()
    assert undecided.prompt.init is None and started.prompt.init == "vocab"
    check_run_dir(undecided)
    check_run_dir(started)
    with pytest.raises(UserError, match="started with prompt.init 'vocab', not 'random'"):
        check_run_dir(load("prompt.init=random"))


def test_an_option_that_a_method_did_not_have_yet_is_no_difference(load: Load):
    config = resolve(load("prompt.method=p_tuning"))
    claim(config)
    run_dir = Path(config.output_dir)
    (run_dir / "checkpoints").mkdir()
    stored = (run_dir / "config.yaml").read_text()
    assert "  encoder_dropout: 0.0\n" in stored
    (run_dir / "config.yaml").write_text(stored.replace("  encoder_dropout: 0.0\n", ""))
    check_run_dir(config)


def test_the_same_config_may_resume(started: Config, load: Load):
    check_run_dir(load())


def test_each_member_of_a_sweep_keeps_the_config_that_it_would_have_alone(load: Load):
    config = load("sweep={seed: [0, 1]}")
    claim(config)
    assert read_run_config(Path(config.output_dir)) == config
    for name, member in expand_sweep(config).items():
        assert read_run_config(Path(config.output_dir) / "members" / name) == member
        assert (member.sweep, member.seed) == (None, int(name[-1]))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("null", "{seed: [0, 1]}"),
        ("{seed: [0, 1]}", "{seed: [1, 0]}"),
        ("{seed: [0, 1]}", "{seed: [0, 1, 2]}"),
        ("{seed: [0, 1], train.learning_rate: [0.1]}", "{train.learning_rate: [0.1], seed: [0, 1]}"),
    ],
)
def test_a_run_is_resumed_only_with_the_same_members_in_the_same_order(load: Load, before: str, now: str):
    config = load(f"sweep={before}")
    claim(config)
    (Path(config.output_dir) / "checkpoints").mkdir()
    check_run_dir(config)
    with pytest.raises(UserError, match="this run was started with sweep"):
        check_run_dir(load(f"sweep={now}"))


def test_the_directory_of_a_sweep_is_that_of_its_best_or_its_named_member(load: Load):
    config = load("sweep={seed: [0, 1]}")
    claim(config)
    run_dir = Path(config.output_dir)
    assert find_member_dir(run_dir, "seed=1") == run_dir / "members" / "seed=1"
    with pytest.raises(UserError, match="an unfinished sweep has no best member"):
        find_member_dir(run_dir, None)
    with pytest.raises(UserError, match="--member: seed=7 is none of seed=0, seed=1"):
        find_member_dir(run_dir, "seed=7")
    write_json(run_dir / "summary.json", {"ranking": [{"member": "seed=1"}, {"member": "seed=0"}]})
    assert find_member_dir(run_dir, None) == run_dir / "members" / "seed=1"


def test_a_run_without_a_sweep_has_no_members(started: Config):
    assert find_member_dir(Path(started.output_dir), None) == Path(started.output_dir)
    with pytest.raises(UserError, match="is not a sweep"):
        find_member_dir(Path(started.output_dir), "seed=0")


def test_a_sweep_is_finished_when_all_members_have_ended(load: Load):
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
    [
        "train.max_steps=99",
        "train.micro_batch_tokens=77",
        "evaluate.every=3",
        "evaluate.metrics=[exact_match]",
        "checkpoint.keep=7",
        "train.context_cache_dir=null",
        "deepspeed={zero_optimization: {stage: 2}}",
    ],
)
def test_what_does_not_affect_learning_may_change(started: Config, load: Load, override: str):
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
def test_what_affects_learning_is_refused_with_the_key_and_both_values(
    started: Config, load: Load, override: str, key: str
):
    with pytest.raises(UserError) as caught:
        check_run_dir(load(override))
    assert key in str(caught.value) and started.output_dir in str(caught.value)


def test_resume_never_admits_a_node_to_replicas_that_are_training(started: Config, load: Load):
    never = load("train.resume=never", "train.nodes=replicas")
    with lock_run_dir(load("train.nodes=replicas")):
        check_run_dir(never)
        with pytest.raises(UserError, match="train.resume is never"):
            check_run_dir(load("train.resume=never"))
    with lock_run_dir(started), pytest.raises(UserError, match="train.resume is never"):
        check_run_dir(never)
    with pytest.raises(UserError, match="train.resume is never"):
        check_run_dir(never)


def test_resume_never_refuses_a_directory_with_a_run(started: Config, load: Load):
    with pytest.raises(UserError, match="output_dir.*train.resume"):
        check_run_dir(load("train.resume=never"))


def test_a_run_is_finished_when_its_summary_says_so(started: Config, load: Load):
    folder = Path(started.output_dir)
    assert is_finished(started) is None
    write_json(folder / "summary.json", {"steps": 20, "evaluations_since_best": 0})
    assert is_finished(started)["steps"] == 20
    assert is_finished(load("train.max_steps=10"))
    assert is_finished(load("train.max_steps=21")) is None
    write_json(folder / "summary.json", {"steps": 7, "evaluations_since_best": 2})
    patient = ["data.validation=x.jsonl", "evaluate.patience=2"]
    assert is_finished(load(*patient))["steps"] == 7
    assert is_finished(load(patient[0], "evaluate.patience=1"))["steps"] == 7
    assert is_finished(load(patient[0], "evaluate.patience=3")) is None
    assert is_finished(started) is None


def test_an_unreadable_summary_is_none(tmp_path: Path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"steps": ')
    assert read_summary(tmp_path) is None


def test_an_output_dir_that_cannot_be_created_is_named(tmp_path: Path, load: Load):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"output_dir: {tmp_path}/file is a file, and a folder is needed"):
        load(f"output_dir={tmp_path}/file")
    with pytest.raises(UserError, match=f"output_dir: {tmp_path}/file/below"):
        claim(load(f"output_dir={tmp_path}/file/below"))


def test_a_directory_is_locked_while_a_run_trains_there(load: Load):
    config = load()
    run_dir = Path(config.output_dir)
    assert not is_locked(run_dir)
    with lock_run_dir(config):
        assert is_locked(run_dir)
        with pytest.raises(UserError, match=f"output_dir: {run_dir}: another process is training here"):
            lock_run_dir(config)
    assert not is_locked(run_dir)


def test_a_part_of_a_run_that_cannot_be_written_is_found_at_the_start_and_the_lock_is_given_back(load: Load):
    config = load()
    run = Path(config.output_dir)
    claim(config)
    assert not [name for name in os.listdir(run) if name.startswith(".probe")]
    (run / "checkpoints").symlink_to(run / "gone")
    with pytest.raises(UserError, match=f"cannot write {run}/checkpoints: a symbolic link to {run}/gone, which leads"):
        lock_run_dir(config)
    assert not is_locked(run)


def test_a_folder_that_may_not_be_written_is_named_with_the_reason(load: Load, monkeypatch: pytest.MonkeyPatch):
    config = load()
    monkeypatch.setattr(os, "access", lambda *_args: False)  # as for a user other than root
    place = Path(config.output_dir).parent
    with pytest.raises(UserError, match=f"cannot write in {place}: Permission denied: change its permissions$"):
        check_run_dir(config)


def test_a_path_that_is_too_long_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match="File name too long$"):
        read_run_config(tmp_path / ("x" * 300))


def test_other_ranks_than_the_first_wait_for_a_file_to_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (tmp_path / "late").touch()

    monkeypatch.setattr(folder.time, "sleep", sleep)
    monkeypatch.setattr(folder, "LATE_S", 5.0)
    assert not wait_to_see(tmp_path / "late") and not pauses
    monkeypatch.setenv("RANK", "1")
    assert wait_to_see(tmp_path / "late") and len(pauses) == 3
    monkeypatch.setattr(folder, "LATE_S", -1.0)
    assert not wait_to_see(tmp_path / "never") and len(pauses) == 3
