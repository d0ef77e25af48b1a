"""Whatever is done to a config or to a DeepSpeed JSON, it is valid or ends in one line: never in a traceback."""

import json

import pytest

from ptune_dist.bench.matrix import load_matrix
from ptune_dist.config.deepspeed_json import fill_deepspeed_json
from ptune_dist.config.load import load_config, render_config
from ptune_dist.errors import UserError
from ptune_dist.run.resolve import resolve
from tests.config.mutations import mutate_json, mutate_yaml
from tests.config.test_deepspeed_json import DTYPES, SHIPPED, build
from tests.processes import ROOT

YAMLS = [path.read_text() for path in sorted(ROOT.glob("configs/*.yaml"))]
MATRICES = [path.read_text() for path in sorted(ROOT.glob("configs/bench/*.yaml"))]
SWEEP = """\
output_dir: runs/x
model: {path: some/base}
data: &data
  train: rows.jsonl
  template: "{{ text }}"
  target: " {{ label }}"
  labels: [yes, no]
evaluate: {every: 2, metrics: [accuracy]}
sweep:
  train.learning_rate: [1e-3, 0.1]
  prompt.init_text: [a, b]
deepspeed: {zero_optimization: {stage: 2}}
"""


def check_yaml(path, seed: int) -> None:
    sources = [*YAMLS, SWEEP]
    path.write_bytes(mutate_yaml(sources[seed % len(sources)], seed))
    try:
        config = load_config(path, resolve=resolve)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"seed {seed}"
        return
    path.write_text(render_config(config))
    assert load_config(path, resolve=resolve) == config, f"seed {seed}"


def check_matrix(path, seed: int) -> None:
    """Every shipped YAML of configs/bench: a matrix of benchmarks, or a config that one of them runs."""
    path.write_bytes(mutate_yaml(MATRICES[seed % len(MATRICES)], seed))
    for read in (load_matrix, load_config):
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, f"seed {seed}"


def check_json(path, seed: int) -> None:
    from ptune_dist.zero.engine import check_with_deepspeed
    from ptune_dist.zero.offload import without_autos
    from ptune_dist.zero.unused_sections import describe_unused

    source = SHIPPED[seed % len(SHIPPED)]
    content = json.dumps(json.loads(source.read_text()), indent=1)
    path.write_text(mutate_json(content, seed))
    config = build(str(path), dtype=DTYPES[source.stem.split("_")[1]])
    try:
        filled = fill_deepspeed_json(config, hidden_size=64)
        check_with_deepspeed(without_autos(filled), str(path))
        describe_unused(filled)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"seed {seed}"


def run_all(check, path, seeds) -> None:
    faults = []
    for seed in seeds:
        try:
            check(path, seed)
        except Exception as error:
            faults.append(f"seed {seed}: {type(error).__name__}: {error}"[:300])
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:40])


CHECKS = [(check_yaml, "c.yaml"), (check_matrix, "m.yaml"), (check_json, "d.json")]


@pytest.mark.parametrize("check, name", CHECKS)
def test_some_hundred_mutated_files_are_valid_or_end_in_one_line(tmp_path, check, name):
    run_all(check, tmp_path / name, range(300))


def test_files_that_once_failed_end_in_one_line(tmp_path):
    run_all(check_yaml, tmp_path / "c.yaml", [11845, 25693])  # the message held a value of 5,000 characters


@pytest.mark.extended
@pytest.mark.parametrize("check, name", CHECKS)
def test_thousands_of_mutated_files_are_valid_or_end_in_one_line(tmp_path, check, name):
    run_all(check, tmp_path / name, range(1000, 11000))
