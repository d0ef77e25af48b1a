"""The code on the page about extending works: added to a copy of the package, it trains, evaluates and exports."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.processes import ROOT, process_env, python_path

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL))
TWO_LINES = ", two lines"


def add_two_lines(file: Path, lines: str) -> None:
    """An import before the first one, and an entry at the beginning of the file's one dict."""
    imported, entry = lines.splitlines()
    text = file.read_text()
    text = re.sub(r"^from ", f"{imported}\nfrom ", text, count=1, flags=re.MULTILINE)
    file.write_text(re.sub(r"( = \{\n)", rf"\1{entry}\n", text, count=1))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A folder with the package, its config and data, and the code of the page."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("ptune_dist", "configs", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for title, code in BLOCKS.items():
        if title.endswith(TWO_LINES):
            add_two_lines(folder / title.removesuffix(TWO_LINES), code)
        else:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(code)
    return folder


def run_in(copy: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=copy,
        env=process_env({"PYTHONPATH": python_path(copy)}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_each_addition_is_one_file_one_dict_and_its_tests():
    assert sorted(BLOCKS) == [
        "ptune_dist/metrics/__init__.py, two lines",
        "ptune_dist/metrics/containment.py",
        "ptune_dist/prompts/__init__.py, two lines",
        "ptune_dist/prompts/low_rank.py",
        "tests/metrics/test_containment.py",
        "tests/prompts/test_low_rank.py",
    ]


@pytest.mark.long
def test_the_tests_of_the_page_pass(copy):
    run_in(copy, "pytest", "-q", "-p", "no:cacheprovider", "tests")


@pytest.mark.extended
@pytest.mark.long
def test_the_method_and_the_metric_of_the_page_train_and_export(copy):
    overrides = ["prompt.method=low_rank", "prompt.rank=3", "evaluate.metrics=[contains, exact_match]"]
    fast = ["train.max_steps=30", "evaluate.max_examples=16", "deepspeed=null", "output_dir=run"]
    run_in(copy, "ptune_dist", "train", "configs/quickstart.yaml", *overrides, *fast)
    summary = json.loads((copy / "run" / "summary.json").read_text())
    assert summary["validation"]["loss"] < summary["before"]["loss"] / 2
    assert summary["validation"]["contains"] >= summary["validation"]["exact_match"]
    run_in(copy, "ptune_dist", "export", "run", "--to", "peft", "--out", "adapter")
    vectors = load_file(copy / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    assert vectors.shape == (10, 160) and int(vectors.float().svd().S.gt(1e-4).sum()) == 3


@pytest.mark.extended
def test_the_docs_of_the_addition_follow_from_the_code(copy):
    env = process_env({"PYTHONPATH": python_path(copy)})
    subprocess.run([sys.executable, "docs/fill_reference.py"], cwd=copy, env=env, check=True)
    options = (copy / "docs" / "configuration.md").read_text()
    assert "| `low_rank` | `prompt.rank` | whole number, above 0 | `4` | The rank of the virtual tokens. |" in options
    metrics = (copy / "docs" / "metrics.md").read_text()
    assert "| `contains` | The share of rows whose answer contains one of their references. |" in metrics
