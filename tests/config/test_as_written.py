"""Text is what was written, numbers are decimal, and a name from another trainer is answered."""

import itertools
from pathlib import Path
from typing import get_args

import pytest

from ptune_dist.config.arguments import drop_dashes
from ptune_dist.config.foreign_names import FOREIGN_NAMES
from ptune_dist.config.foreign_values import FOREIGN_VALUES, name_value
from ptune_dist.config.load import load_config
from ptune_dist.config.messages import known_keys, text_keys
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError
from tests.config.test_config import SMALL, error_of, write  # noqa: F401 -- a fixture

WRITTEN = "[yes, no, on, True, 010, 1_000, 12:30, 0x10, 2024-01-01, .5, 1.50, 1e-3, ~x, 'null', .inf]"
LABELS = "yes no on True 010 1_000 12:30 0x10 2024-01-01 .5 1.50 1e-3 ~x null .inf".split()

# Each line holds the one before nine times.
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefgh")
)


def test_labels_are_what_was_written(write):  # noqa: F811
    in_file = write(SMALL + f"  labels: {WRITTEN}\n")
    assert load_config(in_file).data.labels == LABELS
    assert load_config(write(SMALL), [f"data.labels={WRITTEN}"]).data.labels == LABELS
    assert load_config(write(SMALL), ["prompt.init=labels", "prompt.init_labels=[yes, 1]"]).prompt.init_labels == [
        "yes",
        "1",
    ]


def test_labels_of_a_sweep_are_what_was_written(write):  # noqa: F811
    labels = [["yes", "no"], ["010", "on"]]
    mapping = load_config(write(SMALL + "sweep: {data.labels: [[yes, no], [010, on]]}\n"))
    assert isinstance(mapping.sweep, dict) and mapping.sweep["data.labels"] == labels
    members = load_config(write(SMALL + "sweep: [{data.labels: [yes, no]}, {data.labels: [010, on]}]\n"))
    assert members.sweep == [{"data.labels": found} for found in labels]
    override = load_config(write(SMALL), ["sweep.data.labels=[[yes, no], [010, on]]"])
    assert override.sweep == {"data.labels": labels}


@pytest.mark.parametrize("text", ["yes", "010", "2024-01-01", "12:30", "1e5", ".5", "="])
def test_paths_and_templates_are_what_was_written(write, text):  # noqa: F811
    config = load_config(write(SMALL.replace("runs/x", text).replace('" {{ label }}"', text)))
    assert (config.output_dir, config.data.target) == (text, text)
    assert load_config(write(SMALL), [f"model.path={text}"]).model.path == text


def test_null_and_quoted_texts_keep_their_meaning(write):  # noqa: F811
    config = load_config(write(SMALL + "  validation: ~\n  labels: ['~', \"a\\nb\"]\n"))
    assert (config.data.validation, config.data.labels) == (None, ["~", "a\nb"])
    plain = load_config(write(SMALL), [r"data.template={{ text }}\nx", r'data.target="a\nb"'])
    assert (plain.data.template, plain.data.target) == (r"{{ text }}\nx", "a\nb")  # as in any YAML


@pytest.mark.parametrize("number", ["010", "12:30", "1:30.5"])
def test_numbers_that_yaml_reads_as_others_are_refused(write, number):  # noqa: F811
    assert f"{number} is not a decimal number" in error_of(write(SMALL + f"train: {{max_steps: {number}}}\n"))
    assert f"{number} is not a decimal number" in error_of(write(SMALL), f"train.max_steps={number}")


@pytest.mark.parametrize(
    "content, says",
    [
        (SMALL + "a: &a [*a]\n", "line 7: not valid YAML: an alias that contains itself"),
        (SMALL + "a: " + "[" * 2000, "nested too deeply"),
        (SMALL + "a: !!set {a}\n", "tag !!set is not for a config"),
        (SMALL + "a: !!python/object:os.system x\n", "tag !!python/object:os.system is not for a config"),
        (SMALL + "a: !!bool x\n", "not valid YAML"),
        (SMALL + 'a: "\\0"\n', "a text with a NUL"),
        (SMALL + 'a: "\\ud800"\n', "a text with a NUL or half a surrogate pair"),
        (SMALL + "a: \x07\n", "not valid YAML"),
        (SMALL + "---\nb: 1\n", "a second document begins here"),
        ("#" * (2**20 + 1), "larger than 1 MiB"),
        (BOMB, "more than 200000 values"),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_file_that_no_config_can_be_is_refused_in_one_line(write, content, says):  # noqa: F811
    assert says in error_of(write(content))


def test_a_byte_order_mark_line_ends_of_windows_and_json_are_read(write):  # noqa: F811
    expected = load_config(write(SMALL))
    assert load_config(write(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())) == expected
    as_json = """{\n\t"output_dir": "runs/x",\n\t"model": {"path": "some/base"},\n\t"data": {"train": "rows.jsonl",
\t\t"template": "{{ text }}", "target": " {{ label }}"}\n}"""
    assert load_config(write(as_json, "c.json")) == expected


@pytest.mark.parametrize("folder", ["''", "' '", ".", "./", "..", "/", "~", "{file}", "{model}", "{model}/run"])
def test_a_folder_that_no_run_may_have_is_refused(write, tmp_path, folder):  # noqa: F811
    (tmp_path / "file").write_text("")
    (tmp_path / "base").mkdir()
    folder = folder.format(file=tmp_path / "file", model=tmp_path / "base")
    message = error_of(write(SMALL), f"output_dir={folder}", f"model.path={tmp_path}/base")
    assert message.startswith("command line: output_dir: ")


def test_the_folder_of_a_run_is_no_config(tmp_path):
    (tmp_path / "config.yaml").write_text(SMALL)
    assert error_of(tmp_path).startswith(f"{tmp_path}: the folder of a run")


@pytest.mark.parametrize(
    "key, says",
    [
        ("train.per_device_train_batch_size", "it follows from train.batch_size"),
        ("train.num_train_epochs", "it is train.epochs here"),
        ("block_size", "it is data.max_length here"),
        ("train.early_stopping_patience", "it is evaluate.patience here"),
        ("checkpoint.save_total_limit", "it is checkpoint.keep here"),
        ("train.plot_loss", "a run always writes metrics.jsonl"),
        ("model.load_in_8bit", "it is model.quantization=int8 here"),
        ("prompt.lora_r", "only prompts are trained"),
        ("tokenizer", "the tokenizer in model.path is used"),
    ],
)
def test_a_name_of_another_trainer_is_answered(write, key, says):  # noqa: F811
    section, _, leaf = key.rpartition(".")
    if section == "prompt":  # whose options the method checks
        assert says in FOREIGN_NAMES[leaf]
        return
    assert f"unknown key {key}: " in error_of(write(SMALL), f"{key}=1")
    assert says in error_of(write(SMALL), f"{key}=1")


@pytest.mark.parametrize(
    "key, says",
    [
        ("use_peft", "only prompts are trained"),
        ("completion_only_loss", "the loss is on data.target"),
        ("model.pretrained_model_name_or_path", "it is model.path here"),
        ("enable_liger_kernel", "model.compile"),
        ("log_every_n_steps", "train.log_every"),
        ("zero_stage", "deepspeed=zero3_bf16"),
        ("num_gpus", "the launcher decides"),
        ("nodes", "the launcher decides"),
        ("data.num_proc", "remove it"),
        ("data.csv.sep", "it is data.csv.delimiter here"),
        ("data.csv.names", "it is data.csv.header here"),
        ("train.steps", "it is train.max_steps here"),
        ("train.save_every", "it is checkpoint.every here"),
    ],
)
def test_more_names_of_other_trainers_are_answered(write, key, says):  # noqa: F811
    said = error_of(write(SMALL), f"{key}=1")
    assert said.startswith(f"command line: unknown key {key}: ") and says in said


@pytest.mark.parametrize(
    "override, ours",
    [
        ("model.dtype=bf16", "bfloat16"),
        ("model.dtype=torch.bfloat16", "bfloat16"),
        ("model.dtype=torch.float32", "float32"),
        ("train.optimizer=AdamW", "adamw"),
        ("train.optimizer=adamw_torch", "adamw"),
        ("prompt.init=TEXT", "text"),
    ],
)
def test_a_value_of_another_trainer_is_told_ours(write, override, ours):  # noqa: F811
    said = error_of(write(SMALL), override)
    assert said.startswith(f"command line: {override.partition('=')[0]}: ") and said.endswith(f": write {ours}")


def test_values_of_other_trainers_lead_to_values_that_exist():
    assert name_value("prompt.method", "PROMPT_TUNING") == ": write prompt_tuning"
    assert name_value("model.dtype", "int3") == name_value("model.dtype", 3) == name_value("seed", "x") == ""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for key, values in FOREIGN_VALUES.items():
        section, _, leaf = key.partition(".")
        kinds = [sections[section].model_fields[leaf].annotation]
        while any(get_args(kind) for kind in kinds):
            kinds = [part for kind in kinds for part in get_args(kind) or [kind]]
        assert key == "prompt.method" or set(values.values()) <= set(kinds)


def test_the_table_of_names_is_sorted_and_leads_to_keys_that_exist():
    assert list(FOREIGN_NAMES) == sorted(FOREIGN_NAMES)
    known = known_keys(Config)
    for answer in FOREIGN_NAMES.values():
        if answer.startswith("it is ") and answer.endswith(" here"):
            assert answer.removeprefix("it is ").removesuffix(" here") in known or "=" in answer or " of " in answer


@pytest.mark.parametrize(
    "content, trainer",
    [
        ("base_model: x\ndatasets: [{path: y}]\nsequence_len: 5\nadapter: lora\n", "axolotl"),
        ("model_name_or_path: x\nfinetuning_type: lora\ncutoff_len: 5\ndataset: y\n", "LLaMA-Factory"),
        ("tokenizer: {path: x}\ncheckpointer: {a: b}\ndataset: {a: b}\n", "torchtune"),
        ('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}', "DeepSpeed"),
    ],
)
def test_a_whole_file_of_another_trainer_is_recognized(write, content, trainer):  # noqa: F811
    assert f"this is a file for {trainer}, not a config of ptune-dist" in error_of(write(content))


def test_text_keys_are_those_of_free_text():
    keys = text_keys()
    assert {"output_dir", "data.labels", "prompt.init_labels", "data.template", "model.path", "data.csv.header"} <= keys
    assert not keys & {"train.micro_batch_tokens", "model.compile", "train.optimizer", "seed", "sweep", "train.betas"}


def test_an_override_with_dashes_is_an_override():
    assert drop_dashes("--train.max_steps=5") == "train.max_steps=5"
    assert [drop_dashes(word) for word in ("--input=x", "--top-p", "train.seed=1")] == [
        "--input=x", "--top-p", "train.seed=1",
    ]  # fmt: skip


def test_a_preset_is_found_from_any_folder_unless_a_file_has_its_name(write, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    found = load_config(write(SMALL), ["deepspeed=zero3_bf16"]).deepspeed
    assert isinstance(found, str) and Path(found).is_file() and Path(found).name == "zero3_bf16.json"
    (tmp_path / "zero3_bf16").write_text("{}")
    assert load_config(write(SMALL), ["deepspeed=zero3_bf16"]).deepspeed == str(tmp_path / "zero3_bf16")


def test_a_config_that_cannot_be_opened_is_named(tmp_path):
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(UserError):
            load_config(tmp_path / path)


def test_an_emoji_that_json_escapes_as_two_halves_is_the_character(write):  # noqa: F811
    escaped = r"\ud83d\ude00 \u2028{{ text }}"
    as_json = f"""{{"output_dir": "runs/x", "model": {{"path": "base"}}, "data": {{"train": "rows.jsonl",
        "template": "{escaped}", "target": "{{{{ label }}}}", "labels": ["\\ud83d\\ude00"]}}}}"""
    data = load_config(write(as_json, "c.json")).data
    assert (data.template, data.labels) == ("😀 \u2028{{ text }}", ["😀"])
    assert load_config(write(SMALL), [f'data.template="{escaped}"']).data.template == data.template
    assert "half a surrogate pair" in error_of(write(as_json.replace(r"\ude00", "", 1), "c.json"))
