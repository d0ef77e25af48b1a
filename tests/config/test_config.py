"""A config is what the file and the command line say, or one line that names the file and the key."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.messages import known_keys
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError
from tests.config.resolving import resolve
from tests.processes import ROOT

SMALL = """\
output_dir: runs/x
model: {path: some/base}
data:
  train: rows.jsonl
  template: "{{ text }}"
  target: " {{ label }}"
"""


@pytest.fixture
def write(tmp_path):
    def write_file(content: str | bytes, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides), resolve=resolve)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is read


def test_a_small_file_gets_the_documented_defaults(write):
    config = load_config(write(SMALL))
    assert (config.seed, config.model.dtype, config.prompt.num_virtual_tokens, config.prompt.init) == (
        0,
        "float32",
        20,
        None,
    )
    assert (config.train.batch_size, config.train.micro_batch_tokens, config.data.max_length) == (32, 8192, None)
    assert (config.checkpoint.every, config.checkpoint.keep, config.deepspeed) == (100, 2, None)


def test_the_command_line_wins_over_the_file_and_the_last_word_over_the_first(write):
    path = write(SMALL + "train: {max_steps: 10, batch_size: 4}\n")
    config = load_config(path, ["train.max_steps=20", "train.max_steps=30", "checkpoint.keep=5", "prompt.init=random"])
    assert (config.train.max_steps, config.train.batch_size) == (30, 4)
    assert (config.checkpoint.keep, config.prompt.init) == (5, "random")


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("train.learning_rate=1e-3", lambda c: c.train.learning_rate, 1e-3),
        ("train.learning_rate=5E-2", lambda c: c.train.learning_rate, 5e-2),
        ("train.betas=[0.8, 0.99]", lambda c: c.train.betas, (0.8, 0.99)),
        ("evaluate.metrics=[exact_match, loss]", lambda c: c.evaluate.metrics, ["exact_match", "loss"]),
        ("data.validation=null", lambda c: c.data.validation, None),
        ("model.random_init=true", lambda c: c.model.random_init, True),
        ("model.check=false", lambda c: c.model.check, False),
        ("model.compile=off", lambda c: c.model.compile, "off"),  # to YAML a boolean
        ("model.compile=auto", lambda c: c.model.compile, "auto"),
        ("output_dir=runs/a=b", lambda c: c.output_dir, "runs/a=b"),
        ("output_dir=3e_run", lambda c: c.output_dir, "3e_run"),
        ("data.train=.hidden/e.jsonl", lambda c: c.data.train, ".hidden/e.jsonl"),
        ("deepspeed={zero_optimization: {stage: 2}}", lambda c: c.deepspeed, {"zero_optimization": {"stage": 2}}),
        ("deepspeed.zero_optimization.stage=3", lambda c: c.deepspeed, {"zero_optimization": {"stage": 3}}),
    ],
)
def test_an_override_is_a_yaml_value_and_numbers_may_be_written_as_people_write_them(write, override, read, value):
    assert read(load_config(write(SMALL), [override])) == value


def test_an_override_may_open_a_section_that_the_file_leaves_empty(write):
    assert load_config(write(SMALL + "train:\n"), ["train.max_steps=7"]).train.max_steps == 7


def test_the_resolved_config_reads_back_equal(write, tmp_path):
    config = load_config(
        write(SMALL), ["train.betas=[0.5,0.6]", "data.labels=['no', 'ja: ü']", "deepspeed={bf16: {enabled: auto}}"]
    )
    again = load_config(write(render_config(config), "again.yaml"))
    assert again == config


@pytest.mark.parametrize("value", ["on", "maybe", "1"])
def test_compile_is_auto_or_off(write, value):
    with pytest.raises(UserError, match="model.compile: Input should be 'auto' or 'off'") as caught:
        load_config(write(SMALL), [f"model.compile={value}"])
    assert "\n" not in str(caught.value)


def test_a_config_does_not_change_after_loading(write):
    config = load_config(write(SMALL))
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.train.max_steps = 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_finds_its_files(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    for name in (config.data.train, config.deepspeed):
        assert name is None or isinstance(name, dict) or Path(name).is_absolute() and Path(name).is_file()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_head_and_embeddings_are_stored_in_int8_with_either_quantization(write, quantization):
    config = load_config(write(SMALL), [f"model.quantization={quantization}", "model.int8_include=[head,embeddings]"])
    assert (config.model.quantization, config.model.int8_include) == (quantization, ["head", "embeddings"])


@pytest.mark.parametrize(
    "key, quantization, wanted",
    [
        ("int8_include=[head]", "none", "int8 or fp8"),
        ("int8_activations=true", "none", "int8"),
        ("int8_activations=true", "fp8", "int8"),
    ],
)
def test_keys_of_one_quantization_are_refused_with_another(write, key, quantization, wanted):
    message = error_of(write(SMALL), f"model.quantization={quantization}", f"model.{key}")
    name = key.partition("=")[0]
    assert message.endswith(f"model.{name} is given but model.quantization is {quantization}: set it to {wanted}")


# Where paths are looked up


def test_paths_that_exist_become_absolute_from_the_current_folder_first_then_from_the_configs(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, names in ((here, ["both.jsonl"]), (there, ["both.jsonl", "rows.jsonl", "zero.json"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    (there / "some" / "base").mkdir(parents=True)
    path = there / "c.yaml"
    path.write_text(SMALL + "  validation: both.jsonl\ndeepspeed: zero.json\n")
    monkeypatch.chdir(here)
    config = load_config(path)
    assert config.data.train == str(there / "rows.jsonl")
    assert config.data.validation == str(here / "both.jsonl")
    assert config.model.path == str(there / "some" / "base")
    assert config.deepspeed == str(there / "zero.json")


def test_names_that_are_no_files_here_stay_as_they_are(write):
    config = load_config(write(SMALL), ["model.path=gpt2", "data.train=user/rows:train"])
    assert (config.model.path, config.data.train) == ("gpt2", "user/rows:train")


def test_the_folder_of_the_context_cache_is_absolute_whether_it_exists_or_not(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, found in (("cache", tmp_path / "cache"), ("~/cache", Path(os.path.expanduser("~/cache")))):
        config = load_config(write(SMALL), [f"train.context_cache_dir={given}", "prompt.placement=infix"])
        assert config.train.context_cache_dir == str(found)


# Where the prompt stands


@pytest.mark.parametrize("placement", ["prefix", "infix", "encoder", "decoder"])
def test_every_placement_may_be_asked_for(write, placement):
    assert load_config(write(SMALL), [f"prompt.placement={placement}"]).prompt.placement == placement


@pytest.mark.parametrize("marker", ["{{ prompt }}", "{{prompt}}", "{{-  prompt -}}", "{{\tprompt\n}}"])
def test_a_template_may_say_where_the_prompt_stands(write, marker):
    config = load_config(write(SMALL), ["prompt.placement=template", f"data.template={{{{ text }}}} {marker} ="])
    assert config.prompt.placement == "template"


@pytest.mark.parametrize("template, found", [("{{ text }}", 0), ("{{ prompts }}", 0), ("{{ prompt }}{{ prompt }}", 2)])
def test_a_template_that_does_not_say_once_where_the_prompt_stands_is_refused(write, template, found):
    message = error_of(write(SMALL), "prompt.placement=template", f"data.template={template}")
    assert message.endswith(f"prompt.placement: template needs {{{{ prompt }}}} once in data.template, found {found}")


def test_the_marker_is_a_column_like_any_other_where_the_placement_is_not_the_templates(write):
    assert load_config(write(SMALL), ["data.template={{ prompt }} {{ prompt }}"]).prompt.placement == "prefix"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.GZ"])
def test_text_needs_no_template(write, name):
    assert load_config(write(f"output_dir: x\nmodel: {{path: b}}\ndata: {{train: {name}}}\n")).data.is_plain_text


@pytest.mark.parametrize("placement", ["infix", "encoder", "decoder", "template"])
def test_text_without_inputs_takes_a_prompt_at_its_beginning_only(write, placement):
    assert load_config(write(SMALL), ["data.train=a.txt"])
    message = error_of(write(SMALL), "data.train=a.txt", f"prompt.placement={placement}")
    assert message.endswith(f"prompt.placement: {placement} needs an input and a .txt file has none, use prefix")


# What is refused


@pytest.mark.parametrize(
    "key, near",
    [
        ("train.learning_rat", "train.learning_rate"),
        ("train.lr_learning_rate", "train.learning_rate"),
        ("trainn", "train"),
        ("prompt.num_virtual_token", "prompt.num_virtual_tokens"),  # which resolve says
        ("max_steps", "train.max_steps"),
        ("checkpoint.evry", "checkpoint.every"),
        ("train.context_cache_gb", "train.context_cache_gib"),
        ("sweep_halving.kep", "sweep_halving.keep"),
        ("sweeep", "sweep"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_known_key(write, key, near):
    section, _, leaf = key.rpartition(".")
    in_file = write(SMALL + (f"{section}: {{{leaf}: 1}}\n" if section else f"{leaf}: 1\n"))
    assert error_of(in_file) == f"{in_file}: unknown key {key}, did you mean {near}?"
    assert error_of(write(SMALL), f"{key}=1") == f"command line: unknown key {key}, did you mean {near}?"


@pytest.mark.parametrize(
    "key",
    ["streaming", "strategy", "dictionary", "data.stride", "train.strict", "model.structure", "model.str", "data.bool"],
)
def test_an_unknown_key_keeps_a_name_like_those_of_types(write, key):
    section, _, leaf = key.rpartition(".")
    said = error_of(write(SMALL), f"{key}=1")
    assert said.startswith(f"command line: unknown key {key}") and said[-1] != " "
    if not section:
        in_file = write(SMALL + f"{leaf}: 1\n")
        assert error_of(in_file).startswith(f"{in_file}: unknown key {key}")


def test_an_unknown_key_like_nothing_known_is_named_without_a_guess(write):
    assert error_of(write(SMALL), "zzzzqqqq=1") == "command line: unknown key zzzzqqqq"


def test_an_unknown_section_on_the_command_line_is_the_command_lines_mistake(write):
    message = error_of(write(SMALL), "trian.max_steps=5")
    assert message.startswith("command line: ") and "trian" in message and "train" in message


@pytest.mark.parametrize("wrong, near", [("modle", "model"), ("dta", "data"), ("outputdir", "output_dir")])
def test_a_misspelt_key_that_is_needed_is_said_to_be_misspelt_and_not_only_missing(write, wrong, near):
    path = write(SMALL.replace(f"{near}:", f"{wrong}:"))
    assert error_of(path) == f"{path}: unknown key {wrong}, did you mean {near}?"


@pytest.mark.parametrize(
    "override, says",
    [
        ("train.max_steps=0", "greater than 0"),
        ("train.micro_batch_tokens=0", "greater than 0"),
        ("train.micro_batch_tokens=most", "a number or auto is needed"),
        ("train.max_steps=ten", "'ten'"),
        ("train.max_steps=1.5", "1.5"),
        ("train.learning_rate=-0.1", "-0.1"),
        ("train.learning_rate=.nan", "finite number"),
        ("train.learning_rate=1e38", "less than or equal to 1"),
        ("train.learning_rate=yes", "a number is needed"),
        ("train.optimizer=adamx", "'adamx'"),
        ("train.momentum=1", "less than 1"),
        ("prompt.init=vocabulary", "'vocabulary'"),
        ("model.dtype=float64", "'float64'"),
        ("model.check=maybe", "'maybe'"),
        ("seed=-1", "-1"),
        ("data.labels=positive", "'positive'"),
        ("data.labels=[a, b, a]", "data.labels: 'a' is listed twice"),
        ("evaluate.metrics=[f3]", "'f3'"),
        ("checkpoint.keep=0", "greater than 0"),
        ("prompt.placement=suffix", "'infix', 'template', 'encoder', 'decoder' or 'both'"),
        ("train.context_cache_gib=-1", "greater than or equal to 0"),
        ("train.context_cache_gpu_gib=-1", "greater than or equal to 0"),
        ("train.context_cache_gib=yes", "a number is needed"),
        ("output_dir=null", "got null"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(write, override, says):
    message = error_of(write(SMALL), override)
    assert message.startswith(f"command line: {override.partition('=')[0]}") and says in message


def test_a_wrong_value_in_the_file_names_the_file(write):
    path = write(SMALL + "train: {max_steps: ten}\n")
    assert error_of(path).startswith(f"{path}: train.max_steps: ")


@pytest.mark.parametrize("missing", ["output_dir", "model.path", "data.train"])
def test_what_must_be_given_is_named_when_it_is_not(write, missing):
    content = {"output_dir": SMALL.split("\n", 1)[1], "model.path": SMALL.replace("path: some/base", ""),
               "data.train": SMALL.replace("  train: rows.jsonl\n", "")}[missing]  # fmt: skip
    path = write(content)
    assert error_of(path) == f"{path}: {missing} is missing"


@pytest.mark.parametrize(
    "overrides, keys",
    [
        (["prompt.init=text"], ["prompt.init", "prompt.init_text"]),
        (["prompt.init=file"], ["prompt.init", "prompt.init_file"]),
        (["prompt.init=vocab", "prompt.init_text=hello"], ["prompt.init_text", "prompt.init=text"]),
        (["prompt.init_labels=[a]"], ["prompt.init_labels", "prompt.init"]),
        (["prompt.init=labels"], ["prompt.init", "data.labels"]),
        (["data.target=null"], ["data.template", "data.target"]),
        (["evaluate.metrics=[accuracy]"], ["evaluate.metrics", "data.labels"]),
        (["evaluate.best_metric=exact_match"], ["evaluate.best_metric", "evaluate.metrics"]),
        (["evaluate.patience=2"], ["evaluate.patience", "data.validation"]),
        (["data.train=a.txt", "evaluate.metrics=[exact_match]"], ["evaluate.metrics", ".txt"]),
        (["data.train=a.txt.gz", "evaluate.metrics=[exact_match]"], ["evaluate.metrics", ".txt"]),
        (["train.warmup_steps=10", "train.max_steps=10"], ["train.warmup_steps", "train.max_steps"]),
    ],
)
def test_a_contradiction_names_both_keys(write, overrides, keys):
    message = error_of(write(SMALL), *overrides)
    assert all(key in message for key in keys), message


@pytest.mark.parametrize(
    "content, says",
    [
        (b"output_dir: x\nmodel: {path: [\n", "line 3: not valid YAML"),
        (b"output_dir: x\n\tmodel: y\n", "line 2: not valid YAML"),
        (b"- a\n- b\n", "found list"),
        (b"just text", "found str"),
        (b"", "the config is empty"),
        (b"# nothing\n---\n", "the config is empty"),
        (b"output_dir: \xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_mapping_of_yaml_is_named_with_the_line(write, content, says):
    path = write(content)
    message = error_of(path)
    assert message.startswith(str(path)) and says in message


@pytest.mark.parametrize("value", ["{{ text }}", "{{ text }} =", "{{ text }}:", "{{ text }}, more"])
@pytest.mark.parametrize("line", ["  template: VALUE\n", "  nested: {template: VALUE}\n"])
def test_a_template_without_quotes_is_told_to_be_quoted(write, value, line):
    path = write("output_dir: x\ndata:\n" + line.replace("VALUE", value))
    message = error_of(path)
    assert message.startswith(f"{path} line 3: not valid YAML: ")
    assert message.endswith('; put a template in quotes: "{{ column }}"')


@pytest.mark.parametrize("content", ["? [a, b]\n: 1\n", "? {a: b}\n: 1\n"])
def test_a_key_that_is_a_list_or_a_mapping_is_refused(write, content):
    assert "line 1: not valid YAML: a key must be plain text" in error_of(write(content))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert error_of(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: No such file or directory"
    assert error_of(tmp_path) == f"{tmp_path}: a folder, and a config is a YAML file"


@pytest.mark.parametrize("override", ["train.max_steps", "=5", "output_dir.x=1", "train.max_steps=[1"])
def test_an_override_that_cannot_be_applied_is_named(write, override):
    message = error_of(write(SMALL), override)
    assert message.startswith("command line: ") and override.partition("=")[0] in message


def test_keys_that_are_no_text_are_refused(write):
    path = write(SMALL + "1: 2\n")
    assert error_of(path).startswith(f"{path}: unknown key 1")


def test_known_keys_are_those_of_the_config():
    keys = known_keys(Config)
    assert {"output_dir", "train", "train.max_steps", "prompt.init_file", "deepspeed"} <= set(keys)
    assert {"sweep", "sweep_halving", "sweep_halving.keep"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_a_template_on_the_command_line_is_text(write):
    assert load_config(write(SMALL), ["data.template={{ word }} ="]).data.template == "{{ word }} ="


def test_a_key_given_twice_is_refused_with_its_line(write, tmp_path):
    (tmp_path / "twice.yaml").write_text("seed: 1\nmodel: {path: x}\nseed: 2\n")
    assert "twice.yaml line 3" in error_of(tmp_path / "twice.yaml")


def test_labels_may_be_numbers(write):
    assert load_config(write(SMALL), ["data.labels=[0, 1]"]).data.labels == ["0", "1"]
