"""A wheel of the package has the DeepSpeed JSON files that a config names."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ptune_dist.config.deepspeed_json import preset_names
from tests.processes import ROOT

CONFIG = """\
output_dir: runs/x
model: {{path: {base}}}
data: {{train: {rows}, template: "{{{{ text }}}}", target: " {{{{ label }}}}"}}
deepspeed: zero3_fp32
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because a build writes beside the sources."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "ptune_dist", source / "ptune_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", source, source]
    subprocess.run(command, check=True, timeout=120)
    (file,) = source.glob("*.whl")
    return file


def test_a_wheel_has_every_preset(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    prefix = "ptune_dist/config/presets/"
    assert sorted(name for name in names if name.startswith(prefix)) == [f"{prefix}{n}.json" for n in preset_names()]


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
