"""Experiment trackers: one line where one is missing, all metrics where it is there, no harm where it fails."""

import json
from types import SimpleNamespace

import pytest
from accelerate import tracking

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import Tracker
from ptune_dist.errors import UserError
from ptune_dist.run.metrics_log import MetricsWriter
from ptune_dist.run.resolve import resolve
from ptune_dist.run.trackers import ALWAYS, MODULES, PROJECT, check_trackers
from tests.conftest import write_config
from tests.run.test_metrics_log import line


class FileTracker(tracking.GeneralTracker):
    """Of accelerate's interface and with wandb's arguments: writes lines to a file."""

    name = "files"
    requires_logging_directory = True

    def __init__(self, project: str, logging_dir: str, **options: str):
        super().__init__()
        self.file = f"{logging_dir}.jsonl"
        self.lines = [{"project": project, **options}]

    @property
    def tracker(self):
        return SimpleNamespace(id="id of the service")

    def store_init_configuration(self, values):
        self.lines.append(values)

    def log(self, values, step, **_):
        if step == 3:
            raise OSError("the service is away")
        self.lines.append({"step": step, **values})

    def finish(self):
        with open(self.file, "w") as file:
            json.dump(self.lines, file)


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^train.report_to: comet_ml is not installed: pip install comet-ml$"):
        check_trackers(["tensorboard", "comet_ml"])
    with pytest.raises(UserError, match=r"train.report_to: wandb is not installed: pip install wandb$"):
        load_config(write_config(tmp_path / "c.json"), ["train.report_to=[wandb]"], resolve=resolve)
    with pytest.raises(UserError, match="train.report_to"):
        load_config(write_config(tmp_path / "c.json"), ["train.report_to=[wandbb]"])


def test_every_name_is_one_of_accelerates():
    assert {*MODULES, ALWAYS} == set(Tracker.__args__) <= set(tracking.LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize("fails", [False, True])
def test_a_tracker_gets_what_tensorboard_gets_until_it_fails(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", FileTracker)
    settings = {"": {"learning_rate": 0.1}}
    with MetricsWriter(tmp_path, max_steps=4, first_step=1, settings=settings, report_to=["wandb"]) as metrics:
        metrics.step(line(1), {})
        metrics.evaluation(2, {"loss": 0.5}, [])
        if fails:
            metrics.step(line(3), {})
            metrics.step(line(4), {})
    assert metrics.failure is None
    assert ("train.report_to: wandb is left out: the service is away" in capsys.readouterr().err) == fails
    if fails:
        assert not (tmp_path / "wandb.jsonl").exists()
        return
    found = json.loads((tmp_path / "wandb.jsonl").read_text())
    assert found[:2] == [{"project": "ptune_dist", "name": tmp_path.name, "dir": str(tmp_path)}, settings[""]]
    assert found[2]["train/loss"] == 1.0 and found[2]["step"] == 1
    assert found[3] == {"step": 2, "validation/loss": 0.5}
    with MetricsWriter(tmp_path, max_steps=4, first_step=2, settings=settings, report_to=["wandb"]) as metrics:
        metrics.without_prompt({"loss": 0.75})
    found = json.loads((tmp_path / "wandb.jsonl").read_text())  # of the same run, whose settings are there already
    assert {"id": "id of the service", "resume": "allow"}.items() <= found[0].items()
    assert found[1:] == [{"step": 0, "base_without_prompt/loss": 0.75}]


def test_lines_are_written_every_so_many_steps(tmp_path):
    with MetricsWriter(tmp_path, max_steps=8, first_step=1, log_every=3) as metrics:
        for step in range(1, 9):
            metrics.step(line(step), {})
    steps = [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 6, 8]


@pytest.mark.extended
def test_mlflow_itself_gets_a_sweep_and_continues_its_run(tmp_path, monkeypatch):
    """Where MLflow is installed: the metrics of members, whose names it forbids, and one run after a resume."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(str(tmp_path / "mlruns"))
    members = {f"lr={rate}": tmp_path / f"lr={rate}" for rate in (0.1, 0.2)}
    settings = {name: {"learning_rate": float(name[3:]), "seed": 0} for name in members}
    for first, max_steps in ((1, 2), (3, 4)):
        settings = {name: own | {"max_steps": max_steps} for name, own in settings.items()}
        writer = MetricsWriter(
            tmp_path, max_steps=max_steps, first_step=first, members=members, settings=settings, report_to=["mlflow"]
        )
        with writer as metrics:
            metrics.step(line(first), {})
            metrics.evaluation(first, {"loss": 0.5 / first}, [], member="lr=0.1")
    (found,) = mlflow.search_runs(experiment_names=[PROJECT], output_format="list")
    assert found.info.run_name == tmp_path.name and found.info.status == "FINISHED"
    assert found.data.params == {"seed": "0", "max_steps": "2"}
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "validation/loss/lr:0.1")
    assert [(each.step, each.value) for each in history] == [(1, 0.5), (3, 0.5 / 3)]
    assert found.data.metrics["train/loss"] == line(3)["loss"]
