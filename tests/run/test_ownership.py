"""A run never replaces files that no run has written, and ordinary folders are still taken."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ptune_dist.commands import check_output
from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError
from ptune_dist.prompts.export import check_export_folder
from ptune_dist.run.folder import check_run_dir, is_finished, lock_run_dir, write_run_configs
from ptune_dist.run.ownership import check_target
from ptune_dist.run.status import begin_status
from tests.conftest import write_config
from tests.processes import ROOT

Load = Callable[..., Config]
FOREIGN = {
    "config.yaml": "output_dir: exp1\nmodel: {path: x}\ndata: {train: x}\n",
    "metrics.jsonl": '{"loss": 1}\n',
    "summary.json": '{"steps": 4}\n',
    "status.json": '{"state": "fine"}\n',
    "evaluation.json": "{}\n",
    "baselines.json": "{}\n",
    "checkpoints/epoch-1.pt": "x",
    "checkpoints/step-00000001/model.pt": "x",
    "prompt/prompt.safetensors": "x",
    "members/anna.txt": "x",
    ".git/HEAD": "x",
    "model.safetensors": "x",
    "dataset_info.json": "{}",
}
ORDINARY = {
    "slurm-123.out": "",
    "train.log": "",
    "logs/node1.log": "",
    "exp1.yaml": "output_dir: exp1\n",
    "rows.jsonl": "",
    "runs/other/config.yaml": "",
}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    path = write_config(tmp_path / "c.yaml")
    return lambda *overrides: load_config(path, [f"output_dir={tmp_path / 'exp1'}", *overrides])


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_files_of_the_users_is_refused(name: str, load: Load, tmp_path: Path):
    path = put(tmp_path / "exp1", name, FOREIGN[name])
    with pytest.raises(UserError, match=r"output_dir: .*exp1 (holds|is) .*choose another output_dir"):
        check_run_dir(load())
    assert path.read_text() == FOREIGN[name]


def test_folders_with_other_files_are_taken(load: Load, tmp_path: Path):
    for name, text in ORDINARY.items():
        put(tmp_path / "exp1", name, text)
    (tmp_path / "exp1" / "prompt").mkdir()
    check_run_dir(load())


def test_a_start_that_was_killed_at_any_moment_may_be_repeated(load: Load, tmp_path: Path):
    begin_status(tmp_path / "exp1", "job", in_place=False)
    check_run_dir(load())
    lock_run_dir(load()).close()
    check_run_dir(load())
    write_run_configs(load(), {})
    put(tmp_path / "exp1", "metrics.jsonl", "")
    check_run_dir(load("train.learning_rate=0.9"))


def test_a_config_that_was_copied_from_a_run_is_the_users(load: Load, tmp_path: Path):
    lock_run_dir(load()).close()
    write_run_configs(load(), {})
    (tmp_path / "exp2").mkdir()
    shutil.copy(tmp_path / "exp1" / "config.yaml", tmp_path / "exp2" / "config.yaml")
    with pytest.raises(UserError, match="exp2 holds config.yaml"):
        check_run_dir(load(f"output_dir={tmp_path / 'exp2'}"))


def test_runs_of_earlier_versions_are_runs(tmp_path: Path):
    for old in sorted(path.parent for path in (ROOT / "tests" / "old_runs").glob("*/config.yaml")):
        run = Path(shutil.copytree(old, tmp_path / old.name))
        check_run_dir(load_config(run / "config.yaml", [f"output_dir={run}"]))


def test_a_run_without_its_config_still_resumes(load: Load, tmp_path: Path):
    put(tmp_path / "exp1", "checkpoints/step-00000004/state.json", "{}")
    put(tmp_path / "exp1", "metrics.jsonl", "{}\n")
    check_run_dir(load())


def test_a_damaged_summary_is_written_again(load: Load, tmp_path: Path):
    lock_run_dir(load()).close()
    write_run_configs(load(), {})
    ranking = '{"steps": 4, "evaluations_since_best": 0, "ranking": %s}'
    for text in ("[]", "3", '{"steps": 4}', ranking % "1", ranking % "[1]", "[" * 99999):
        put(tmp_path / "exp1", "summary.json", text)
        check_run_dir(load())
        assert is_finished(load()) is None


TARGETS = ("exp1/config.yaml", "exp1/prompt/x", "exp1/checkpoints/a/b", "base/config.json", "base/new", "rows.jsonl")


@pytest.mark.parametrize("name", [*TARGETS, "in.jsonl"])
def test_no_command_writes_into_a_run_or_over_its_inputs(name: str, load: Load, tmp_path: Path):
    put(tmp_path, "base/config.json", "{}")
    rows = put(tmp_path, "rows.jsonl", "{}\n")
    given = put(tmp_path, "in.jsonl", "{}\n")
    config = load(f"model.path={tmp_path / 'base'}", f"data.train={rows}")
    lock_run_dir(config).close()
    write_run_configs(config, {})
    with pytest.raises(UserError, match=r"^--output: .*: choose another"):
        check_target("--output", tmp_path / name, config, {"--input-file": str(given)})
    check_target("--output", tmp_path / "exp1" / "answers.jsonl", config, {"--input-file": str(given)})


def test_the_mark_is_a_comment(load: Load, tmp_path: Path):
    lock_run_dir(load()).close()
    write_run_configs(load(), {})
    text = (tmp_path / "exp1" / "config.yaml").read_text()
    assert text.startswith("# Written by ptune-dist") and text.endswith(render_config(load()))
    assert load_config(tmp_path / "exp1" / "config.yaml") == load()


def test_a_folder_in_use_names_the_host_and_the_process(load: Load, tmp_path: Path):
    with lock_run_dir(load()):
        with pytest.raises(
            UserError, match=rf"process {os.getpid()} on host {socket.gethostname()}: wait for it"
        ) as own:
            lock_run_dir(load())
        assert "PTUNE_NUM_NODES" not in str(own.value)
        (tmp_path / "exp1" / ".lock").write_text('{"host": "node-7", "pid": 12}')
        with pytest.raises(
            UserError, match="process 12 on host node-7.*PTUNE_NUM_NODES, PTUNE_NODE_RANK and PTUNE_HEAD"
        ):
            lock_run_dir(load())
        (tmp_path / "exp1" / ".lock").write_text("")
        with pytest.raises(UserError, match="another process is training here: wait for it or end it$"):
            lock_run_dir(load())
    with lock_run_dir(load()):
        assert (tmp_path / "exp1" / ".lock").read_text()
    assert not (tmp_path / "exp1" / ".lock").read_text()


def test_a_file_in_the_way_is_named_once(load: Load, tmp_path: Path):
    (tmp_path / "exp1").write_text("")
    with pytest.raises(UserError, match="exp1 is a file: a folder is needed$"):
        check_run_dir(load(f"output_dir={tmp_path / 'exp1' / 'x'}"))


def test_answers_replace_only_answers(load: Load, tmp_path: Path):
    def check(path: Path) -> None:
        check_output(path, None, load())

    for number, text in enumerate(
        ["", '{"word": "a", "generated": "b"}\n', '{"gold": "b", "label": "b", "num_tokens": 1}\n']
    ):
        check(put(tmp_path, f"answers{number}.jsonl", text))
    check(tmp_path / "new.jsonl")
    check(Path("/dev/null"))
    for number, text in enumerate(["notes", '{"word": "a"}\n', "[1]\n", "\n", '"generated"\n']):
        with pytest.raises(UserError, match=r"^--output: .* holds no answers of ours: choose another one$"):
            check(put(tmp_path, f"notes{number}.txt", text))


def test_an_adapter_that_peft_has_written_is_not_replaced(tmp_path: Path):
    put(tmp_path, "adapter_model.safetensors", "x")
    put(tmp_path, "adapter_config.json", '{"peft_type": "PROMPT_TUNING"}')
    check_export_folder(tmp_path, "peft")
    put(tmp_path, "adapter_config.json", '{"peft_type": "PROMPT_TUNING", "auto_mapping": null}')
    with pytest.raises(UserError, match="--out: .* that PEFT has written"):
        check_export_folder(tmp_path, "peft")


def test_a_new_folder_beside_a_bases_files_is_taken_and_each_of_several_sources_is_kept(load: Load, tmp_path: Path):
    base = tmp_path / "base"
    weights = put(base, "model.safetensors", "x")
    sources = [put(tmp_path / name, "prompt.safetensors", "x") for name in ("one", "two")]
    config = load(f"model.path={base}", "prompt.init=file", f"prompt.init_file=[{sources[0]}, {sources[1]}]")
    check_target("--out", base / "adapter", config, {}, makes_folder=True)
    for path in (weights, *sources):
        with pytest.raises(UserError, match=f"^--out: {path} is "):
            check_target("--out", path, config, {}, makes_folder=True)
