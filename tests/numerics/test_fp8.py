"""A base in fp8, emulated on a CPU: its curve is near the float one, and does not depend on how the base is stored."""

import json
from pathlib import Path

import pytest

from tests.conftest import TINY, write_config
from tests.numerics.test_curves import curve, train_all, zero_json

pytestmark = pytest.mark.long
NUM_STEPS = 16


def write_run(folder: Path, name: str, quantization: str, deepspeed: dict, **more) -> tuple[str, list[str]]:
    (folder / name).mkdir()
    sections = {
        "model": {"path": str(TINY / "causal"), "quantization": quantization} | more.pop("model", {}),
        "train": {"max_steps": NUM_STEPS, "batch_size": 16, "schedule": "constant", "learning_rate": 0.01},
        "prompt": {"num_virtual_tokens": 10, "init": "vocab"},
        "deepspeed": deepspeed,
    }
    return str(write_config(folder / name / "config.json", output_dir=str(folder / name), **sections, **more)), []


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two ranks; `resumed` has stopped after 8 steps and then been resumed."""
    folder = tmp_path_factory.mktemp("fp8")
    include = {"int8_include": ["head", "embeddings"]}
    specs = [
        write_run(folder, "float", "none", zero_json(0)),
        write_run(folder, "stage0", "fp8", zero_json(0)),
        write_run(folder, "stage3", "fp8", zero_json(3) | {"activation_checkpointing": {}}),
        write_run(folder, "bfloat16", "fp8", zero_json(3), model={"dtype": "bfloat16"}),
        write_run(folder, "all", "fp8", zero_json(3), model=include),
    ]
    resumed, _ = write_run(folder, "resumed", "fp8", zero_json(3), checkpoint={"every": 8})
    return train_all([*specs, (resumed, ["train.max_steps=8"]), (resumed, [])], folder, num_ranks=2)


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


@pytest.mark.extended
def test_fp8_learns_what_a_float_base_teaches(runs):
    exact = curve(runs["float"])
    for name in ("stage0", "bfloat16", "all"):
        found = curve(runs[name])
        assert found != exact, name
        assert found == pytest.approx(exact, rel=0.1), name
        assert mean(found) == pytest.approx(mean(exact), rel=0.02), name
    assert mean(exact[-5:]) < 0.2 * exact[0]


def test_sharding_recomputing_and_resuming_change_no_loss(runs):
    for name in ("stage3", "resumed"):  # of which the first recomputes
        assert curve(runs[name]) == pytest.approx(curve(runs["stage0"]), rel=1e-5), name


def test_each_rank_stores_its_share_of_one_byte_for_each_weight(runs):
    whole = summary_of(runs["stage0"])["ranks"][0]["base_bytes"]
    assert whole < 0.3 * summary_of(runs["float"])["ranks"][0]["base_bytes"]
    for rank in summary_of(runs["stage3"])["ranks"]:
        assert rank["base_bytes"] == pytest.approx(whole / 2, rel=0.01)


def test_no_bit_of_the_base_changes_and_no_engine_casts_its_scales(runs):
    hashes = {name: json.loads((run / "base_hashes.json").read_text()) for name, run in runs.items()}
    for name, found in hashes.items():
        assert found["after"] == found["before"], name
    quantized = [name for name in hashes["stage0"]["before"] if name.endswith(".scales")]
    assert len(quantized) > 10
    for scales in quantized:
        for part in (scales, scales.replace(".scales", ".weight")):
            assert len({hashes[name]["after"][part] for name in ("stage0", "stage3", "bfloat16")}) == 1, part
