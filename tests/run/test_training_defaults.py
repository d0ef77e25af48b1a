"""The learning rate and the warm-up where a config leaves them out: the method's, or those that a run began with."""

import json
from pathlib import Path

import pytest
import yaml

from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError
from ptune_dist.evaluation.splits import build_splits
from ptune_dist.families import FAMILIES
from ptune_dist.prompts import METHODS
from ptune_dist.run.folder import first_difference
from ptune_dist.run.parts import build_parts
from ptune_dist.run.reading import Reading, build_reading
from ptune_dist.run.resolve import resolve
from ptune_dist.run.trained_tokens import describe_trained_tokens
from ptune_dist.run.training_defaults import describe_rates, describe_warm_ups
from tests.conftest import LABELS, TINY, write_config


def read(folder: Path, prompt: dict | None = None, *, train: dict | None = None, **more: object) -> Reading:
    """A config over the shipped base without a learning rate, unless `train` has one."""
    path = write_config(folder / "config.json", prompt=prompt or {}, **more)
    content = yaml.safe_load(path.read_text())
    del content["train"]["learning_rate"]
    content["train"] |= train or {}
    path.write_text(yaml.safe_dump(content))
    return build_reading(load_config(path, resolve=resolve))


def rates(reading: Reading) -> dict[str, float | None]:
    return {name: member.train.learning_rate for name, member in reading.members.items()}


def store(config: Config, **train: object) -> None:
    """Write a config as a run's that has begun, with other values."""
    folder = Path(config.output_dir)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    changed = config.model_copy(update={"train": config.train.model_copy(update=train)})
    (folder / "config.yaml").write_text(render_config(changed))


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_rate_and_a_warm_up_for_each_family(name):
    method = METHODS[name]
    for family in FAMILIES:
        found = method.choose_training(method.options_type.model_construct(), family)
        assert 0 < found.learning_rate <= 0.5 and 0 <= found.warmup_share <= 0.5


def test_what_is_left_out_is_the_methods_and_what_is_given_stays(tmp_path):
    found = read(tmp_path, {"method": "prefix_tuning"})
    own = METHODS["prefix_tuning"].default_training.learning_rate
    assert own != METHODS["prompt_tuning"].default_training.learning_rate
    assert found.config.train.learning_rate == own == rates(found)["prompt"]
    assert found.config.train.warmup_steps == 0
    given = read(tmp_path, {"method": "prefix_tuning"}, train={"learning_rate": 0.07, "warmup_steps": 3}).config.train
    assert (given.learning_rate, given.warmup_steps) == (0.07, 3)


def test_an_mlp_that_makes_a_prefix_has_the_rate_of_one_that_makes_virtual_tokens(tmp_path):
    found = read(tmp_path, {"method": "prefix_tuning", "reparameterization": "mlp"})
    assert found.config.train.learning_rate == METHODS["p_tuning"].default_training.learning_rate


def test_a_share_of_the_steps_is_a_number_of_steps(tmp_path):
    prompt = {"method": "bias_only", "num_virtual_tokens": 0}
    share = METHODS["bias_only"].default_training.warmup_share
    assert read(tmp_path, prompt, train={"max_steps": 200}).config.train.warmup_steps == round(share * 200) > 0
    assert read(tmp_path, prompt, train={"max_steps": 1}).config.train.warmup_steps == 0


def test_members_of_other_methods_have_their_own(tmp_path):
    found = read(tmp_path, sweep={"prompt.method": ["prompt_tuning", "prefix_tuning"]})
    expected = [METHODS[name].default_training.learning_rate for name in ("prompt_tuning", "prefix_tuning")]
    assert list(rates(found).values()) == expected
    assert found.config.train.learning_rate is None  # so that a resumed sweep leaves each member its own
    assert found.config.train.warmup_steps == 0  # of both


def test_the_rates_are_told_in_one_phrase_or_for_each_member(tmp_path):
    assert describe_rates(read(tmp_path).members) == "learning rate 0.3"
    found = read(tmp_path, sweep={"train.learning_rate": [0.001, 0.2]}).members
    assert describe_rates(found) == "learning rates 0.001 (learning_rate=0.001), 0.2 (learning_rate=0.2)"


def test_members_given_a_rate_keep_it_and_null_means_left_out(tmp_path):
    found = read(tmp_path, sweep={"train.learning_rate": [0.01, None, 0.2]})
    assert list(rates(found).values()) == [0.01, METHODS["prompt_tuning"].default_training.learning_rate, 0.2]
    outside = read(tmp_path, train={"learning_rate": 0.02}, sweep={"prompt.method": ["prompt_tuning", "p_tuning"]})
    assert set(rates(outside).values()) == {0.02}


def test_a_run_that_has_begun_keeps_the_values_that_it_began_with(tmp_path):
    config = read(tmp_path).config
    store(config, learning_rate=0.123, warmup_steps=7)
    assert not first_difference(
        load_config(Path(config.output_dir) / "config.yaml").model_dump(),
        load_config(tmp_path / "config.json").model_dump(),
    )
    found = read(tmp_path)
    assert (found.config.train.learning_rate, found.config.train.warmup_steps) == (0.123, 7)
    assert rates(found) == {"prompt": 0.123}


def test_members_of_a_sweep_that_has_begun_keep_theirs(tmp_path):
    sweep = {"prompt.method": ["prompt_tuning", "prefix_tuning"]}
    found = read(tmp_path, sweep=sweep)
    store(found.config)
    for rate, member in zip((0.11, 0.22), found.members.values(), strict=True):
        store(member, learning_rate=rate)
    assert list(rates(read(tmp_path, sweep=sweep)).values()) == [0.11, 0.22]


def test_a_folder_without_anything_that_was_trained_gets_the_defaults(tmp_path):
    config = read(tmp_path).config
    store(config, learning_rate=0.123)
    (Path(config.output_dir) / "checkpoints").rmdir()
    assert read(tmp_path).config.train.learning_rate == METHODS["prompt_tuning"].default_training.learning_rate


def test_frozen_positions_that_a_file_had_may_be_named_once_it_is_gone():
    before = {"prompt": {"num_frozen": None, "num_virtual_tokens": 4}}
    assert first_difference(before, {"prompt": {"num_frozen": 1, "num_virtual_tokens": 4}}) is None
    assert first_difference({"prompt": {"num_frozen": 2}}, {"prompt": {"num_frozen": 1}}) == "prompt.num_frozen"


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_an_optimizer_whose_steps_are_of_another_size_needs_a_rate(tmp_path, optimizer):
    with pytest.raises(UserError, match=f"^train.learning_rate is missing: .* train.optimizer is {optimizer}: give a"):
        read(tmp_path, train={"optimizer": optimizer})
    with pytest.raises(UserError, match="^sweep: optimizer=sgd: train.learning_rate is missing"):
        read(tmp_path, sweep={"train.optimizer": ["adamw", "sgd"]})
    given = read(tmp_path, train={"optimizer": optimizer, "learning_rate": 0.2})
    assert given.config.train.learning_rate == 0.2
    store(given.config)
    assert read(tmp_path, train={"optimizer": optimizer}).config.train.learning_rate == 0.2  # as it was begun


def test_members_with_warm_ups_of_their_own_are_told_apart(tmp_path):
    assert describe_warm_ups(read(tmp_path).members) == "warm-up 0 steps"
    found = read(tmp_path, sweep={"train.warmup_steps": [3, 0]}).members
    assert describe_warm_ups(found) == "warm-up steps 3 (warmup_steps=3), 0 (warmup_steps=0)"


def test_an_error_of_one_member_names_it(tmp_path):
    missing = {"prompt.init": "file", "prompt.init_file": "absent"}
    found = read(tmp_path, sweep=[{"seed": 1}, missing])
    with pytest.raises(UserError, match="^sweep: init=file,init_file=absent: prompt.init_file: cannot read"):
        build_parts(found, None, with_start=True, rows=build_splits(found).training)
    same = read(tmp_path, {"init": "file", "init_file": "absent"}, sweep={"seed": [0, 1]})
    with pytest.raises(UserError, match="^prompt.init_file: cannot read"):
        build_parts(same, None, with_start=True, rows=build_splits(same).training)
    with pytest.raises(UserError, match="^sweep: template=---absent---: data.template"):
        build_splits(read(tmp_path, sweep={"data.template": ["{{ word }} =", "{{ absent }}"]}))


LABELLED = {"labels": LABELS, "target": "{{ 'short' if word|length < 6 else 'long' }}"}
CACHED = {"context_cache_gib": 1.0}


@pytest.mark.parametrize(
    ("kind", "method", "advice"),
    [
        ("llama", "p_tuning", ", or set prompt.placement to one of infix, template"),
        ("llama", "cpt", ""),
        ("t5", "p_tuning", ", or set prompt.placement to decoder"),
        ("bert", "p_tuning", ""),
    ],
)
def test_placements_that_the_base_and_the_method_have_are_advised_for_a_context_cache(
    tmp_path, tiny_bases, kind, method, advice
):
    sections = {"model": {"path": str(tiny_bases[kind])}}
    if kind == "bert":
        sections["data"] = LABELLED
    with pytest.raises(UserError, match=f"has no contexts to keep: leave it out{advice}$"):
        read(tmp_path, {"method": method}, train=CACHED, **sections)


def test_the_member_for_which_a_cache_keeps_nothing_is_named(tmp_path):
    sweep = [{"prompt.method": "late_prompt"}, {"prompt.method": "prompt_tuning"}]
    with pytest.raises(UserError, match="^sweep: method=prompt_tuning: train.context_cache_gib is given but"):
        read(tmp_path, sweep=sweep, train=CACHED)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_tokens_that_no_training_row_has_are_found_before_training(tmp_path, tiny_bases, kind):
    """In an encoder's rows, the label is no token."""
    sections = {"model": {"path": str(tiny_bases[kind])}}
    if kind == "bert":
        sections["data"] = LABELLED
    prompt = {"method": "trainable_tokens", "num_virtual_tokens": 0}

    def lines(tokens: list[str]) -> list[str]:
        found = read(tmp_path, prompt | {"tokens": tokens}, **sections)
        rows = build_splits(found)
        parts = build_parts(found, None, with_start=True, rows=rows.training)
        return list(describe_trained_tokens(parts.prompts, rows.splits, found))

    words = [json.loads(line)["word"] for line in Path(TINY / "data" / "train.jsonl").read_text().splitlines()]
    count = sum("z" in word for word in words)
    assert 0 < count < len(words)
    start = f"prompt.tokens: {count:,} of the {len(words):,} training rows have one"
    (line,) = lines(["z"])
    assert line.startswith(start)
    first, warning = lines(["z", "!"])
    assert first.startswith(start) and "no training row has '!' (" in warning
    with pytest.raises(UserError, match="^prompt.tokens: no training row has '!' .[0-9]+., '#' .[0-9]+. in its input"):
        lines(["!", "#"])
    if kind == "llama":
        assert lines(["Z"])  # answers are in capitals
    else:
        with pytest.raises(UserError, match="no training row has 'Z' .[0-9]+. in its input"):
            lines(["Z"])
