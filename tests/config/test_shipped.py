"""What comes with the package is found by name, and `init` and `launcher-files` write it for editing."""

import subprocess
import sys
from pathlib import Path

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.config.shipped import (
    LAUNCHERS,
    SHIPPED,
    TASKS,
    find_recipe,
    find_shipped,
    recipe_names,
    write_first_config,
    write_launcher_files,
)
from ptune_dist.errors import UserError
from tests.processes import ROOT, process_env


def test_every_shipped_folder_is_one_of_the_repository():
    for name in ("recipes", "tiny", *LAUNCHERS):
        folder = ROOT / "configs" / name if name not in LAUNCHERS else ROOT / name
        assert (SHIPPED / name).resolve() == folder


def test_bases_and_data_are_found_by_name_and_everything_else_is_left_alone():
    assert Path(find_shipped("tiny-causal"), "config.json").is_file()
    assert Path(find_shipped("recipes/data/sentiment_train.jsonl")).is_file()
    for other in ("tiny-none", "tiny/causal", "recipes/data/none.jsonl", "recipes", "gpt2", 3, None):
        assert find_shipped(other) == other


def test_a_file_of_the_user_wins_over_a_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "tiny-causal").mkdir()
    (tmp_path / "sentiment_gpt2.yaml").write_text("mine")
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny/sentiment_gpt2", ["model.path=tiny-causal"])
    assert config.model.path == str(tmp_path / "tiny-causal")
    assert find_recipe("sentiment_gpt2.yaml") == "sentiment_gpt2.yaml"
    assert find_recipe("sentiment_gpt2") != "sentiment_gpt2"


@pytest.mark.parametrize("task", TASKS)
def test_init_writes_a_config_that_is_read_from_any_folder(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_first_config(task, None)
    assert file == Path(f"{task}.yaml")
    config = load_config(file)
    paths = [config.model.path, *config.data.train_sources, *config.data.validation_sources]
    assert all(Path(path).is_absolute() for path in paths), paths
    comments = [line for line in file.read_text().splitlines() if "#" in line]
    assert len(comments) >= 4


def test_init_writes_a_recipe_by_its_name_and_never_over_a_file(tmp_path):
    out = tmp_path / "mine.yaml"
    write_first_config("sentiment_bert", out)
    assert out.read_text() == (ROOT / "configs/recipes/sentiment_bert.yaml").read_text()
    with pytest.raises(UserError, match="exists already"):
        write_first_config("sentiment_bert", out)
    assert set(TASKS.values()) <= set(recipe_names())


def test_an_unknown_task_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unknown task sentimnt: did you mean sentiment"):
        write_first_config("sentimnt", tmp_path / "x.yaml")


def test_launcher_files_start_the_interpreter_that_has_the_package(tmp_path):
    files = write_launcher_files(tmp_path)
    names = {str(file.relative_to(tmp_path)) for file in files}
    assert {"launch/run.sh", "launch/ssh.sh", "launch/skypilot.yaml", "slurm/train.sbatch"} <= names
    assert "launch/setup.sh" not in names
    for file in files:
        assert file.read_text().startswith((SHIPPED / file.relative_to(tmp_path)).read_text())
    command = [tmp_path / "launch/run.sh", "none.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=process_env())
    assert done.returncode == 2 and "none.yaml" in done.stdout + done.stderr
    assert sys.executable in (tmp_path / "launch/site.sh").read_text()
    with pytest.raises(UserError, match="exists already"):
        write_launcher_files(tmp_path)


# Revisions

SMALL = """\
output_dir: runs/x
model: {path: user/base}
data: {train: user/rows, template: "{{ text }}", target: " {{ label }}"}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "c.yaml").write_text(SMALL)
    return tmp_path / "c.yaml"


def test_a_pinned_base_is_read_back_as_it_was(config):
    pinned = load_config(config, ["model.revision=abc", "data.revision=v1"])
    assert (pinned.model.path, pinned.model.revision) == ("user/base@abc", "abc")
    again = load_config(config, ["model.path=user/base@abc", "model.revision=abc"])
    assert again.model == pinned.model


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["model.revision=abc", "model.path=tiny-causal"], "model.revision is for a name on the hub"),
        (["data.revision=abc", "data.train=rows.jsonl"], "data.revision is for a dataset on the hub"),
        (
            ["data.revision=abc", "data.validation=user/others:test"],
            "pins one dataset, and there are user/others, user/rows",
        ),
    ],
)
def test_a_revision_that_pins_nothing_is_refused_in_one_line(config, overrides, says):
    with pytest.raises(UserError, match=says) as error:
        load_config(config, overrides)
    assert str(error.value).startswith("command line: ")
