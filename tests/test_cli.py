"""A user's mistake is one line that names the file or the key, exit status 2, and spoils nothing."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import TINY, write_config
from tests.processes import command_line

ROWS = TINY / "data" / "train.jsonl"
EVALUATE = {"every": 0, "max_examples": 4, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    data = {"validation": str(TINY / "data" / "validation.jsonl")}
    path = tmp_path_factory.mktemp("cli") / "c.yaml"
    return write_config(path, data=data, train={"max_steps": 2, "batch_size": 4}, evaluate=EVALUATE)


@pytest.fixture(scope="module")
def trained(commands, config) -> Path:
    """A finished run of two steps."""
    finished = commands.run("train", config)
    assert (finished.code, finished.err) == (0, "")
    return config.parent / "run"


@pytest.fixture
def refuse(commands, config, tmp_path):
    """Train with overrides that are a mistake; the one line, after seeing that nothing was made."""

    def run(*overrides: str) -> str:
        output = tmp_path / "refused"
        finished = commands.run("train", config, f"output_dir={output}", *overrides)
        assert not output.exists()
        return only_error(finished)

    return run


def only_error(finished) -> str:
    """The message of a command that ended as a user's mistake ends.

    Before it there may be the one line that says what the command is about to do.
    """
    assert finished.code == 2, finished.err
    lines = finished.err.splitlines()
    if lines[0].startswith("ptune-dist ") and lines[0].endswith("importing torch ..."):
        lines = lines[1:]
    assert len(lines) == 1 and len(finished.errors) == 1, finished.err
    return finished.errors[0]


# The config


@pytest.mark.parametrize(
    "override, says",
    [
        ("train.learning_rat=1", "command line: unknown key train.learning_rat, did you mean train.learning_rate?"),
        ("train.optimizer=adamx", "train.optimizer"),
        ("train.max_steps", "command line: train.max_steps: write train.max_steps=VALUE"),
        ("train.betas=[0.9, 1.0]", "betas"),
        ("model.dtype=float16", "model.dtype: float16 needs a GPU"),
    ],
)
def test_a_wrong_key_or_value_is_named(refuse, override, says):
    assert says in refuse(override)


def test_a_config_that_is_missing_or_no_yaml_is_named(commands, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("output_dir: x\nmodel: [\n")
    assert (
        only_error(commands.run("train", tmp_path / "no.yaml"))
        == f"error: {tmp_path}/no.yaml: No such file or directory"
    )
    assert f"{bad} line 3: not valid YAML" in only_error(commands.run("train", bad))


def test_a_contradiction_with_deepspeeds_json_names_file_and_both_keys(refuse, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 64}))
    message = refuse(f"deepspeed={path}")
    assert f"{path}: train_batch_size is 64 but train.batch_size is 4" in message


@pytest.mark.parametrize(
    "zero, says",
    [
        ({"stage": 2, "reduce_bucket_siz": 100}, "reduce_bucket_siz"),
        ({"stage": 5}, "stage"),
        ({"stage": "three"}, "stage"),
    ],
)
def test_what_deepspeed_itself_refuses_in_its_json_is_one_line_too(refuse, tmp_path, zero, says):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    message = refuse(f"deepspeed={path}")
    assert str(path) in message and says in message


# The base


def test_a_missing_model_folder_is_named(refuse, tmp_path):
    assert f"model.path: no folder {tmp_path}/base" in refuse(f"model.path={tmp_path}/base")


def test_rows_and_texts_with_a_token_beyond_the_bases_embeddings_are_refused(refuse, commands, config, tmp_path):
    base = shutil.copytree(TINY / "causal", tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 258, "content": "<extra>"})
    (base / "tokenizer.json").write_text(json.dumps(content))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"word": "a", "answer": "A"}\n{"word": "<extra>", "answer": "B"}\n')
    message = refuse(f"model.path={base}", f"data.train={rows}")
    assert f"{rows} line 2 has the token '<extra>' with id 258, but the base has 258 embeddings" in message
    start = ["prompt.init=text", "prompt.init_text=<extra>"]
    assert "prompt.init_text: '<extra>' has the token" in refuse(f"model.path={base}", *start)
    assert commands.run("validate", config, f"model.path={base}", f"output_dir={tmp_path}/other").code == 0


def test_a_hub_name_without_a_network_ends_soon(config, tmp_path):
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://10.255.255.1", "HF_HOME": str(tmp_path)}  # answers nobody
    began = time.monotonic()
    finished = run_command("train", config, "model.path=nobody/nothing", f"output_dir={tmp_path}/run", env=env)
    assert time.monotonic() - began < 20
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: model.path: ") and "nobody/nothing" in line and "network" in line


# The data


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"word": "a", "answer": "A"}\nnot json\n', "rows.jsonl line 2: not JSON"),
        ('{"word": "a", "answer": "A"}\n\n{"word": "b"}\n', "rows.jsonl line 3: column 'answer'"),
        ('{"word": "a", "answer": ""}\n', "rows.jsonl line 1: data.target is empty"),
        ('{"word": "a", "label": "A"}\n', "data.target uses column 'answer'"),
        ("", "rows.jsonl has no rows"),
        (b'{"word": "\xff", "answer": "A"}\n', "rows.jsonl line 1"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named_with_their_line(refuse, tmp_path, content, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refuse(f"data.train={path}")


def test_a_missing_data_file_is_named_with_the_nearest_one(refuse, tmp_path):
    assert f"did you mean {ROWS}?" in refuse(f"data.train={ROWS.parent}/trian.jsonl")


def test_a_target_longer_than_max_length_is_named_with_its_line(refuse):
    message = refuse("data.max_length=5")
    assert ".jsonl line 1: data.target" in message and "data.max_length 5" in message


@pytest.mark.parametrize(
    "more", [["evaluate.metrics=[exact_match]"], ["evaluate.metrics=[accuracy]", "data.labels=[a, b]"]]
)
def test_validation_text_without_targets_cannot_be_matched(refuse, tmp_path, more):
    (tmp_path / "v.txt").write_text("some text\n")
    message = refuse(f"data.validation={tmp_path}/v.txt", *more)
    assert "v.txt" in message or "evaluate.metrics" in message


# The command line


def test_an_unknown_command_is_refused_with_the_known_ones(commands):
    message = only_error(commands.run("frobnicate"))
    assert "frobnicate" in message and "train" in message and "generate" in message


def test_no_command_and_no_config_are_refused(commands):
    assert "a command is needed: init, train, validate" in only_error(commands.run())
    message = only_error(commands.run("train"))
    assert "CONFIG" in message and "key.path=value" not in message  # overrides are not required


def test_input_for_a_template_of_several_columns_asks_for_a_file(commands, trained):
    message = only_error(commands.run("generate", trained, "data.template='{{ a }} {{ b }}'", "--input", "x"))
    assert "a, b" in message and "--input-file" in message


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--input", "x", "--max-new-tokens", "-1"], "max-new-tokens"),
        (["--input", "x", "--temperature", "0"], "temperature"),
        (["--input-file", "no.jsonl"], "--input-file"),
        (["--input", "x", "--output", "/nowhere/out.jsonl"], "/nowhere/out.jsonl"),
        ([], "--input"),
    ],
)
def test_flags_of_generate_that_cannot_be_met_are_named(commands, trained, arguments, says):
    assert says in only_error(commands.run("generate", trained, *arguments))


@pytest.mark.parametrize(
    "command", [["evaluate"], ["generate", "--input", "x"], ["export", "--to", "peft", "--out", "out"]]
)
def test_a_folder_that_is_no_run_is_named(commands, tmp_path, command):
    name, *rest = command
    assert f"{tmp_path}: not a run" in only_error(commands.run(name, tmp_path, *rest))


def test_a_run_cannot_be_judged_with_a_prompt_of_another_size_or_on_another_base(commands, trained, tmp_path):
    message = only_error(commands.run("evaluate", trained, "prompt.num_virtual_tokens=7"))
    assert "num_virtual_tokens" in message
    base = shutil.copytree(TINY / "causal", tmp_path / "base")
    content = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (base / "config.json").write_text(json.dumps(content))
    assert f"model.path: {base}" in only_error(commands.run("evaluate", trained, f"model.path={base}"))


# Under torchrun


@pytest.mark.long
def test_under_torchrun_a_message_is_said_once_and_every_rank_ends(config, tmp_path):
    finished = run_command("train", config, "data.max_length=5", f"output_dir={tmp_path}/run", num_ranks=2, fresh=True)
    assert finished.returncode != 0  # torchrun's own status: it does not pass that of a rank on
    (line,) = [line for line in finished.stderr.splitlines() if "error: " in line]
    assert line.startswith("error: ") and "line 1: data.target" in line
    assert "exitcode  : 2" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_python_m_and_the_exit_status_are_the_commands(config, tmp_path):
    finished = run_command("train", tmp_path / "no.yaml", fresh=True)
    assert (finished.returncode, finished.stderr) == (2, f"error: {tmp_path}/no.yaml: No such file or directory\n")
    assert sys.executable in command_line("ptune_dist", "env")
