"""A sweep is a list of members, each the config that it would have had alone, with a name fit for a folder."""

import re
from pathlib import Path

import pytest

from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.messages import known_keys
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import FILLED_KEYS, ONLY_MEMBER, PATH_KEYS, SWEEPABLE, expand_sweep, member_config
from ptune_dist.errors import UserError
from ptune_dist.run.folder import first_difference

MODEL = "output_dir: runs/x\nmodel: {path: some/base}\n"
SMALL = MODEL + 'data: {train: rows.jsonl, template: "{{ text }}", target: " {{ label }}"}\n'
TASKS = """\
sweep:
- {data.train: a.jsonl, data.validation: av.jsonl}
- {data.train: b.jsonl, data.validation: bv.jsonl}
"""


@pytest.fixture
def load(tmp_path):
    def load_text(content: str, *overrides: str) -> Config:
        path = tmp_path / "c.yaml"
        path.write_text(content, encoding="utf-8")
        return load_config(path, list(overrides))

    return load_text


@pytest.fixture
def error_of(load, tmp_path):
    """The one line that a config is refused with; FILE stands for its path."""

    def say(content: str, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load(content, *overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(str(tmp_path / "c.yaml"), "FILE")

    return say


def names(config: Config) -> list[str]:
    return list(expand_sweep(config))


# What the members are


def test_without_a_sweep_the_config_is_its_own_only_member(load):
    config = load(SMALL)
    assert expand_sweep(config) == {"prompt": config} and expand_sweep(config)[ONLY_MEMBER] is config


def test_of_a_mapping_every_combination_is_a_member_and_the_last_key_changes_fastest(load):
    members = expand_sweep(load(SMALL + "sweep: {train.learning_rate: [0.3, 0.1], seed: [0, 1]}\n"))
    assert [(m.train.learning_rate, m.seed) for m in members.values()] == [(0.3, 0), (0.3, 1), (0.1, 0), (0.1, 1)]
    assert list(members) == [f"learning_rate={rate},seed={seed}" for rate in (0.3, 0.1) for seed in (0, 1)]


def test_of_a_list_each_mapping_is_a_member_and_need_not_have_the_keys_of_the_others(load):
    members = expand_sweep(load(SMALL + "sweep: [{seed: 3}, {train.optimizer: sgd, train.momentum: 0.9}]\n"))
    assert list(members) == ["seed=3", "optimizer=sgd,momentum=0.9"]
    assert [(m.seed, m.train.optimizer, m.train.momentum) for m in members.values()] == [
        (3, "adamw", 0.0), (0, "sgd", 0.9)
    ]  # fmt: skip


def test_a_member_is_the_config_that_the_file_would_be_with_its_values_and_a_folder_of_its_own(load):
    swept = load(SMALL + "sweep: {train.learning_rate: [0.1, 0.2], prompt.num_virtual_tokens: [5]}\n")
    name = "learning_rate=0.2,num_virtual_tokens=5"
    alone = ["train.learning_rate=0.2", "prompt.num_virtual_tokens=5", f"output_dir=runs/x/members/{name}"]
    assert expand_sweep(swept)[name] == load(SMALL, *alone)


def test_a_member_has_neither_sweep_nor_halving(load):
    content = SMALL + "sweep: {seed: [0, 1]}\nsweep_halving: {every: 50, keep: 0.5}\n"
    config = load(content, "data.validation=v.jsonl")
    assert (config.sweep_halving.every, config.sweep_halving.keep) == (50, 0.5)
    assert all(m.sweep is None and m.sweep_halving is None for m in expand_sweep(config).values())


def test_the_command_line_takes_the_dotted_key_of_a_sweep_as_it_stands(load):
    assert names(load(SMALL, "sweep.train.learning_rate=[0.1, 3e-1]", "sweep.seed=[7]")) == [
        "learning_rate=0.1,seed=7", "learning_rate=0.3,seed=7"
    ]  # fmt: skip


def test_the_command_line_replaces_and_ends_the_sweep_of_a_file(load):
    swept = SMALL + "sweep: {seed: [0, 1]}\n"
    assert names(load(swept, "sweep={train.learning_rate: [0.1, 0.3]}")) == ["learning_rate=0.1", "learning_rate=0.3"]
    assert names(load(swept, "sweep.seed=[5, 6]")) == ["seed=5", "seed=6"]
    assert names(load(swept, "sweep=[{seed: 8}]")) == ["seed=8"]
    assert names(load(swept, "sweep=null")) == [ONLY_MEMBER]


@pytest.mark.parametrize(
    "sweep",
    [
        "sweep: {train.learning_rate: [1e-5, 0.1], data.labels: [[a, 'ja: ü'], [b]], prompt.init: [random, vocab]}\n",
        "sweep: [{train.betas: [0.8, 0.9], seed: 1}, {prompt.init: text, prompt.init_text: 'Say: yes'}]\n",
        "sweep: {seed: [0, 1]}\nsweep_halving: {every: 10, keep: 0.25}\n",
    ],
)
def test_the_resolved_sweep_reads_back_equal_with_its_members_in_order(load, sweep):
    config = load(SMALL + sweep, "data.validation=v.jsonl")
    again = load(render_config(config))
    assert again == config and list(expand_sweep(again).items()) == list(expand_sweep(config).items())


def test_what_every_member_is_given_need_not_be_given_outside_the_sweep(load):
    config = load(MODEL + 'data: {template: "{{ text }}", target: " {{ label }}"}\n' + TASKS)
    assert (config.data.train, config.data.validation) == ("a.jsonl", "av.jsonl")
    assert [m.data.train for m in expand_sweep(config).values()] == ["a.jsonl", "b.jsonl"]
    assert load(render_config(config)) == config
    assert load(SMALL + TASKS).data.train == "rows.jsonl"  # what is given stands
    assert names(load(SMALL, "prompt.init=text", "sweep.prompt.init_text=[Say yes, Say no]")) == [
        "init_text=Say-yes", "init_text=Say-no"
    ]  # fmt: skip
    assert len(names(load(SMALL, "sweep=[{prompt.init: text, prompt.init_text: a}, {prompt.init: vocab}]"))) == 2
    assert len(names(load(SMALL, "sweep={prompt.init: [text], prompt.init_text: [a, b]}"))) == 2
    whole = load(MODEL + "sweep: [{data.train: a.txt}, {data.train: b.txt}]\n")
    assert whole.data.train == "a.txt"


@pytest.mark.parametrize("given", ["{data.train: [here.jsonl, user/rows]}", "[{data.train: here.jsonl}, {seed: 1}]"])
def test_paths_in_a_sweep_are_looked_up_as_all_others_are(load, tmp_path, given):
    (tmp_path / "here.jsonl").write_text("{}")
    config = load(SMALL + f"sweep: {given}\n")
    members = list(expand_sweep(config).values())
    assert members[0].data.train == str(tmp_path / "here.jsonl")
    assert members[1].data.train in ("user/rows", "rows.jsonl")


def test_the_sweepable_keys_are_keys_of_the_config_and_their_last_parts_tell_them_apart():
    assert set(SWEEPABLE) <= set(known_keys(Config))
    assert len({key.rpartition(".")[2] for key in SWEEPABLE}) == len(SWEEPABLE)
    assert set(PATH_KEYS) | set(FILLED_KEYS) <= set(SWEEPABLE)


# What they are called


@pytest.mark.parametrize(
    "values, name",
    [
        ("{train.learning_rate: 1e-3}", "learning_rate=0.001"),
        ("{train.eps: 0.000001}", "eps=1e-06"),
        ("{train.betas: [0.5, 0.9]}", "betas=0.5+0.9"),
        ("{data.append_eos: false}", "append_eos=false"),
        ("{data.validation: null}", "validation=null"),
        ("{data.train: ../some/where/rows.v2.jsonl}", "train=rows.v2"),
        ("{data.train: 'user/v1.5:train'}", "train=v1.5-train"),
        ("{prompt.init: file, prompt.init_file: runs/old/prompt}", "init=file,init_file=prompt"),
        ('{data.template: "../{{ text }}\\n"}', "template=..----text----"),
        ("{data.labels: [so so, ü/..]}", "labels=so-so+--.."),
        ("{seed: 1, train.learning_rate: 0.1}", "seed=1,learning_rate=0.1"),
    ],
)
def test_a_name_says_the_values_in_the_order_of_the_keys_and_is_safe_as_a_folders(load, values, name):
    assert names(load(SMALL + f"sweep: [{values}]\n")) == [name]
    assert re.fullmatch(r"[A-Za-z0-9_.=,+-]+", name)


def test_names_that_collide_or_are_too_long_are_numbered_the_same_each_time(load):
    config = load(SMALL, "sweep.data.train=[a/x.jsonl, b/x.jsonl, c/X.csv]")
    assert names(config) == names(config) == ["train=x", "train=x-2", "train=X-3"]
    long = [("word " * 40) + end for end in "abc"]
    found = names(load(SMALL, f"sweep={[{'prompt.init': 'text', 'prompt.init_text': text} for text in long]}"))
    assert len(set(found)) == 3 and {len(name) for name in found} == {80}
    assert found[1].endswith("-2") and found[2].endswith("-3") and found[1].startswith(found[0][:78])


def test_the_folders_of_the_members_are_below_the_runs(load):
    members = expand_sweep(load(SMALL, "sweep.seed=[0, 1]"))
    assert [Path(m.output_dir) for m in members.values()] == [Path("runs/x/members") / name for name in members]


def test_a_member_is_found_by_its_name_and_a_wrong_name_is_told_the_right_ones(load):
    config = load(SMALL, "sweep.seed=[4, 5]")
    assert member_config(config, "seed=5").seed == 5
    assert member_config(load(SMALL), ONLY_MEMBER) == load(SMALL)
    with pytest.raises(UserError) as caught:
        member_config(config, "seed=6")
    assert str(caught.value) == "--member: seed=6 is none of seed=4, seed=5"


# What is refused


@pytest.mark.parametrize(
    "sweep, message",
    [
        ("{}", "sweep: a mapping of keys to lists, or a list of mappings, is needed, got {}"),
        ("[]", "sweep: a mapping of keys to lists, or a list of mappings, is needed, got []"),
        ("5", "sweep: a mapping of keys to lists, or a list of mappings, is needed, got 5"),
        ("{seed: []}", "sweep.seed: the list of values is empty"),
        ("{seed: 5}", "sweep.seed: a list of values is needed, got 5"),
        ("[{seed: 5}, {}]", "sweep: member 2: a mapping of keys to values is needed, got {}"),
        ("[{seed: 5}, 6]", "sweep: member 2: a mapping of keys to values is needed, got 6"),
        ("{train.max_steps: [5]}", "sweep.train.max_steps: not a key that members can differ in"),
        ("[{model.path: gpt2}]", "sweep.model.path: not a key that members can differ in"),
        ("{1: [2]}", "sweep.1: not a key that members can differ in"),
        (
            "{train.learning_rat: [1]}",
            "sweep.train.learning_rat: not a key that members can differ in, did you mean train.learning_rate?",
        ),
        (
            "{learning_rate: [1]}",
            "sweep.learning_rate: not a key that members can differ in, did you mean train.learning_rate?",
        ),
        (
            "{num_virtual_token: [1]}",
            "sweep.num_virtual_token: not a key that members can differ in, did you mean prompt.num_virtual_tokens?",
        ),
        ("[{sed: 1}]", "sweep.sed: not a key that members can differ in, did you mean seed?"),
        (
            "{train: {learning_rate: [1]}}",
            "sweep.train: the keys of a sweep are dotted, such as train.learning_rate",
        ),
    ],
)
def test_what_is_no_sweep_is_named_with_its_key_in_a_file_and_on_the_command_line(error_of, sweep, message):
    assert error_of(SMALL + f"sweep: {sweep}\n") == f"FILE: {message}"
    assert error_of(SMALL, f"sweep={sweep}") == f"command line: {message}"


def test_a_key_of_a_sweep_on_the_command_line_is_the_command_lines_mistake(error_of):
    assert error_of(SMALL, "sweep.train.betaz=[1]") == (
        "command line: sweep.train.betaz: not a key that members can differ in, did you mean train.betas?"
    )
    assert error_of(SMALL + "sweep: [{seed: 1}]\n", "sweep.seed=[2]").startswith("command line: sweep.seed: sweep is")


@pytest.mark.parametrize(
    "sweep, says",
    [
        ("{train.learning_rate: [0.1, -1]}", "sweep: learning_rate=-1: train.learning_rate: Input should be greater"),
        ("{seed: [0, true]}", "sweep: seed=true: seed: a number is needed, got True"),
        ("{data.labels: [yes, no]}", "sweep: labels=yes: data.labels: a list is needed"),
        ("[{seed: 1}, {train.warmup_steps: 1000}]", "sweep: warmup_steps=1000: train.warmup_steps must be less than"),
        ("{prompt.init: [vocab, text]}", "sweep: init=text: prompt.init: text needs prompt.init_text"),
        ("{data.template: [null]}", "sweep: template=null: data.template and data.target are needed"),
        ("[{data.train: rows.txt}]", "sweep: train=rows: prompt.placement: encoder needs an input"),
        ("{seed: [1, 2, 1]}", "sweep: seed=1 and seed=1-2 are the same member, leave one out"),
        ("[{seed: 0}, {train.weight_decay: 0.0}]", "sweep: seed=0 and weight_decay=0.0 are the same member"),
        ("{train.learning_rate: [1, 1.0]}", "sweep: learning_rate=1 and learning_rate=1.0 are the same member"),
    ],
)
def test_a_member_that_could_not_be_trained_alone_or_is_there_twice_is_named(error_of, sweep, says):
    content = SMALL + "prompt: {placement: encoder}\n"
    if "labels" in sweep:  # a list outside, or the first member's value would stand there
        content = content.replace("data: {", "data: {labels: [a], ")
    assert error_of(content + f"sweep: {sweep}\n").startswith(f"FILE: {says}")
    assert error_of(content, f"sweep={sweep}").startswith(f"command line: {says}")


def test_what_is_wrong_outside_the_sweep_is_not_blamed_on_a_member(error_of):
    message = error_of(SMALL + "sweep: {seed: [0, 1]}\ntrain: {max_steps: ten}\n")
    assert message.startswith("FILE: train.max_steps: ")
    assert error_of(MODEL + "sweep: [{data.train: a.jsonl}, {seed: 1}]\ndata: {}\n") == "FILE: data.train is missing"
    assert error_of(MODEL + "data: 5\n" + TASKS).startswith("FILE: data: ")


@pytest.mark.parametrize(
    "halving, says",
    [
        ("{every: 0, keep: 0.5}", "sweep_halving.every: "),
        ("{every: 5, keep: 0}", "sweep_halving.keep: "),
        ("{every: 5, keep: 1}", "sweep_halving.keep: "),
        ("{every: 5}", "sweep_halving.keep is missing"),
        ("{keep: 0.5}", "sweep_halving.every is missing"),
        ("{evry: 5, keep: 0.5}", "unknown key sweep_halving.evry, did you mean sweep_halving.every?"),
        ("{every: 5, keep: 0.5}", "sweep: seed=0: sweep_halving needs data.validation"),
    ],
)
def test_halving_says_when_and_how_many_go_on_and_needs_rows_to_judge_by(error_of, halving, says):
    assert error_of(SMALL + f"sweep: {{seed: [0, 1]}}\nsweep_halving: {halving}\n").startswith(f"FILE: {says}")


def test_halving_needs_a_sweep_and_validation_rows_for_every_member(error_of):
    halving = "sweep_halving: {every: 5, keep: 0.5}\n"
    assert error_of(SMALL + halving).startswith("FILE: sweep_halving needs sweep")
    assert error_of(SMALL + TASKS + halving, "sweep=[{data.validation: v.jsonl}, {data.validation: null}]") == (
        "command line: sweep: validation=null: sweep_halving needs data.validation"
    )


def test_a_key_of_the_config_that_is_not_sweepable_is_not_taken_for_a_misspelt_one(error_of):
    for key in (key for key in known_keys(Config) if "." in key and key not in SWEEPABLE):
        assert error_of(SMALL, f"sweep.{key}=[1]") == (
            f"command line: sweep.{key}: not a key that members can differ in"
        )


# What a resumed run may change


@pytest.mark.parametrize(
    "now, differs",
    [
        ("{seed: [0, 1], train.eps: [1e-6]}", None),
        ("{train.eps: [1e-6], seed: [0, 1]}", "sweep"),  # other names
        ("{seed: [0, 1, 2], train.eps: [1e-6]}", "sweep"),
        ("{seed: [0, 1]}", "sweep"),
        ("[{seed: 0}, {seed: 1}]", "sweep"),
        ("null", "sweep"),
    ],
)
def test_a_resumed_run_keeps_its_sweep_as_a_whole(load, now, differs):
    before = load(SMALL + "sweep: {seed: [0, 1], train.eps: [1.0e-6]}\n")
    after = load(SMALL, f"sweep={now}", "prompt.placement=prefix")
    assert first_difference(before.model_dump(), after.model_dump()) == differs


def test_a_resumed_run_may_change_what_caching_costs_but_not_its_halving(load):
    given = ["prompt.placement=infix", "sweep.seed=[0, 1]", "data.validation=v", "sweep_halving={every: 5, keep: 0.5}"]
    before = load(SMALL, *given).model_dump()
    cached = load(SMALL, *given, "train.context_cache_gib=2", "train.context_cache_dir=/tmp/x").model_dump()
    assert first_difference(before, cached) is None
    halved = load(SMALL, *given, "sweep_halving.every=7").model_dump()
    assert first_difference(before, halved) == "sweep_halving.every"
