"""The invariants with a fused base: curves are those of a plain loop, sharded, recomputed or in int8."""

import json
from pathlib import Path

import pytest

from tests.numerics.plain import plain_curve
from tests.numerics.test_curves import curve, train_all, write_spec, zero_json

SCRIPT = str(Path(__file__).with_name("train_fused.py"))
RECOMPUTED = {"activation_checkpointing": {"cpu_checkpointing": False}}
INT8 = ["model.quantization=int8"]


@pytest.mark.long
def test_a_fused_base_trains_as_a_plain_loop_does(tiny_bases, tmp_path):
    base = tiny_bases["llama"]
    specs = [
        write_spec(tmp_path, base, "stage0", zero_json(0), []),
        write_spec(tmp_path, base, "stage3", zero_json(3), []),
        write_spec(tmp_path, base, "recomputed", zero_json(3) | RECOMPUTED, ["train.micro_batch_tokens=60"]),
        write_spec(tmp_path, base, "int8", zero_json(0), INT8),
        write_spec(tmp_path, base, "int8_stage3", zero_json(3), INT8),
        write_spec(tmp_path, base, "int8_off", zero_json(0), [*INT8, "model.compile=off"]),
    ]
    curves = {name: curve(run) for name, run in train_all(specs, tmp_path, num_ranks=2, script=SCRIPT).items()}
    for name in curves:
        assert (int((tmp_path / name / "num_kernel_calls").read_text()) == 0) == (name == "int8_off"), name
    for name in ("stage0", "stage3", "recomputed"):
        assert curves[name] == pytest.approx(plain_curve(base), rel=1e-5), name
        hashes = json.loads((tmp_path / name / "base_hashes.json").read_text())
        assert hashes["after"] == hashes["before"], name
    for name in ("int8", "int8_stage3"):
        assert curves[name] == pytest.approx(curves["int8_off"], rel=1e-5), name
