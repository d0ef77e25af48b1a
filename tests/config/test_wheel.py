"""A wheel of the package works without the repository: what a config names travels in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from ptune_dist.config.deepspeed_json import preset_names
from tests.processes import ROOT

CONFIG = """\
output_dir: runs/x
model: {{path: {base}}}
data: {{train: {rows}, template: "{{{{ text }}}}", target: " {{{{ label }}}}"}}
deepspeed: zero3_fp32
"""


SHIPPED = {"recipes": "configs/recipes", "tiny": "configs/tiny", "launch": "launch", "slurm": "slurm"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, and that from a copy, because a build writes beside the sources.

    The copy's links lead to its own folders.
    """
    source = tmp_path_factory.mktemp("source")
    for name in ("ptune_dist", "configs", "launch", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out]
    subprocess.run(command, cwd=source, check=True, timeout=120, capture_output=True)
    (file,) = out.glob("*.whl")
    return file


def tracked_files(folder: str) -> set[str]:
    return {str(file.relative_to(ROOT / folder)) for file in (ROOT / folder).rglob("*") if file.is_file()}


def test_a_wheel_has_every_preset(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    prefix = "ptune_dist/config/presets/"
    assert sorted(name for name in names if name.startswith(prefix)) == [f"{prefix}{n}.json" for n in preset_names()]


def test_a_wheel_has_the_recipes_the_tiny_bases_and_the_files_that_start_jobs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name, folder in SHIPPED.items():
        prefix = f"ptune_dist/shipped/{name}/"
        assert {found.removeprefix(prefix) for found in names if found.startswith(prefix)} == tracked_files(folder)


@pytest.mark.long
def test_an_installed_wheel_works_alone_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    env = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [site / "bin" / "ptune-dist", *arguments], cwd=work, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("init", "sentiment")
    shown = run("train", "sentiment.yaml", "train.max_steps=2", "evaluate.max_examples=8", "deepspeed=zero3_fp32")
    assert "finished: runs/sentiment, 2 steps" in shown and "ZeRO 3" in shown
    stored = yaml.safe_load((work / "runs/sentiment/config.yaml").read_text())
    assert Path(stored["model"]["path"]) == site / "ptune_dist/shipped/tiny/bert"
    run("launcher-files", "cluster")
    assert os.access(work / "cluster/launch/run.sh", os.X_OK)


@pytest.mark.extended
def test_an_installed_wheel_finds_a_preset_from_any_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    tiny = ROOT / "configs/tiny"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a fine film", "label": "good"}\n{"text": "a bad film", "label": "bad"}\n')
    (tmp_path / "c.yaml").write_text(CONFIG.format(base=tiny / "causal", rows=rows))
    code = "import ptune_dist; print(ptune_dist.__file__); from ptune_dist.cli import run; run()"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, "validate", "c.yaml"]
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(str(tmp_path / "site")) and '"stage": 3' in found.stdout
