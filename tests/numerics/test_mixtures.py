"""Invariants 1, 2, 6 and 7 for mixtures of experts in int8, from float and from MXFP4 checkpoints."""

import shutil
from pathlib import Path

import pytest

from ptune_dist.run.checkpoint import list_checkpoints
from tests.numerics.mixtures import KINDS, save_base, save_dequantized, save_unpacked
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_sharding import hashes_of, write_run

SAVES = ["checkpoint.every=4"]
RUNS = [("plain", ""), ("int8", "-0"), ("int8", "-3")]


def specs_of(kind: str, folder: Path, dtypes: list[str]) -> list:
    """The plain base with the numbers of int8 at ZeRO 0, and int8 at ZeRO 0 and 3."""
    base = save_base(kind, folder / "base")
    plain = save_unpacked(base, folder / "unpacked") if kind == "mxfp4" else base
    dequantized = save_dequantized(plain, folder / "dequantized")
    specs = []
    for dtype in dtypes:
        specs.append(write_run(folder, f"plain-{dtype}", dequantized, zero={"stage": 0}, dtype=dtype))
        for stage in (0, 3):
            how = {"zero": {"stage": stage}, "dtype": dtype, "quantization": "int8", "more": SAVES}
            specs.append(write_run(folder, f"int8-{dtype}-{stage}", base, **how))
    return specs


def resume(run: Path, folder: Path, num_ranks: int) -> Path:
    """Train on from the run's first checkpoint, as if it had been killed after it."""
    copy = folder / "resumed"
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    for checkpoint in list_checkpoints(copy / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    train_all([(str(run / "config.json"), [*SAVES, f"output_dir={copy}"])], folder, num_ranks=num_ranks)
    return copy


def check(kind: str, folder: Path, num_ranks: int, dtypes: list[str]) -> None:
    runs = train_all(specs_of(kind, folder, dtypes), folder, num_ranks=num_ranks)
    for dtype in dtypes:
        plain, whole, cut = (runs[f"{name}-{dtype}{stage}"] for name, stage in RUNS)
        bound = 1e-5 if dtype == "float32" else 2e-3
        assert curve(whole) == pytest.approx(curve(plain), rel=bound)
        assert curve(cut) == pytest.approx(curve(whole), rel=bound)
        assert hashes_of(cut, "before") == hashes_of(cut, "after") == hashes_of(whole, "before")
    run = runs[f"int8-{dtypes[-1]}-3"]
    again = resume(run, folder, num_ranks)
    assert curve(again) == curve(run)
    last = "step-00000008/prompt.safetensors"
    assert (again / "checkpoints" / last).read_bytes() == (run / "checkpoints" / last).read_bytes()


@pytest.mark.extended
@pytest.mark.parametrize("kind", [*KINDS, "mxfp4"])
def test_int8_experts_train_as_the_dequantized_base_does_whole_and_sharded(kind, tmp_path):
    check(kind, tmp_path, 2, ["float32", "bfloat16"])


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param("qwen3_moe", marks=pytest.mark.extended), "mxfp4"])
def test_int8_experts_train_as_the_dequantized_base_does(kind, tmp_path):
    check(kind, tmp_path, 2, ["float32"])
