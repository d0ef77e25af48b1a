"""A run that may start from several trained prompts starts from the best one, on any ranks, and scores them once."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ptune_dist.prompts.p_tuning import PTuning, PTuningOptions
from tests.commands import run_command
from tests.conftest import write_config
from tests.numerics.plain import NUM_VIRTUAL
from tests.numerics.test_curves import curve, train_all, zero_json

pytestmark = pytest.mark.long
WIDTH = 32
STILL = ["train.learning_rate=1e-9", "train.max_steps=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sources")
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        vectors = torch.randn(NUM_VIRTUAL, WIDTH, generator=draw) * 2
        save_file({"virtual_tokens": vectors}, made / f"plain{number}.safetensors")
        encoder = PTuning(NUM_VIRTUAL, WIDTH, PTuningOptions(encoder_hidden_size=8), seed=number)
        with torch.no_grad():
            encoder.embedding.weight.mul_(5)
        save_file({name: p.detach() for name, p in encoder.named_parameters()}, made / f"encoder{number}.safetensors")
    return made


def write(folder, name: str, base, sources, stage: int = 0, **prompt):
    files = [str(folder / f"{one}.safetensors") for one in sources]
    start = {"init": "file", "init_file": files if len(files) > 1 else files[0]}
    (folder / name).mkdir()
    return str(
        write_config(
            folder / name / "config.json",
            output_dir=str(folder / name),
            model={"path": str(base)},
            prompt={"num_virtual_tokens": NUM_VIRTUAL, **start, **prompt},
            deepspeed=zero_json(stage),
            checkpoint={"every": 2},
        )
    )


def lines_of(run) -> list[str]:
    return [line for line in (run / "train.log").read_text().splitlines() if "on the first 4 batches" in line]


def test_the_best_source_is_taken_on_any_ranks_and_stages_and_once(folder, llama):
    plain = [f"plain{number}" for number in range(3)]
    encoders = [f"encoder{number}" for number in range(3)]
    p_tuning = {"method": "p_tuning", "encoder_hidden_size": 8}
    alone = [(write(folder, f"alone-{one}", llama, [one]), STILL) for one in plain]
    alone += [(write(folder, f"alone-{one}", llama, [one], **p_tuning), STILL) for one in encoders]
    alone.append((write(folder, "one", llama, plain), STILL))
    alone.append((write(folder, "encoders", llama, encoders, **p_tuning), STILL))
    train_all(alone, folder, num_ranks=1)
    three = write(folder, "three", llama, plain, stage=3)
    train_all([(three, [STILL[0], "train.max_steps=2", "train.schedule=constant"])], folder, num_ranks=2)
    train_all([(three, [*STILL, "train.schedule=constant"])], folder, num_ranks=2)  # resumed
    for names, chosen in ((plain, ["one", "three"]), (encoders, ["encoders"])):
        losses = {one: curve(folder / f"alone-{one}") for one in names}
        best = min(names, key=lambda one: np.mean(losses[one]))
        for run in chosen:
            (line,) = lines_of(folder / run)
            assert f"the prompt starts from {folder / best}.safetensors: loss " in line
            assert float(line.split("loss ")[1].split()[0]) == pytest.approx(np.mean(losses[best]), rel=0.02)
            assert all(f"of {folder / other}.safetensors" in line for other in names if other != best)
            assert curve(folder / run) == pytest.approx(losses[best], rel=1e-5)


def test_each_member_of_a_sweep_has_its_own_sources(folder, llama):
    config = json.loads(open(write(folder, "swept", llama, ["plain0", "plain1"])).read())
    files = config["prompt"]["init_file"]
    config["sweep"] = [{"prompt.init_file": files}, {"prompt.init_file": files[0]}, {"prompt.init_file": files[::-1]}]
    path = folder / "swept" / "config.json"
    path.write_text(json.dumps(config))
    train_all([(str(path), STILL)], folder, num_ranks=1)
    lines = lines_of(folder / "swept")
    assert len(lines) == 2
    members = sorted(member.name for member in (folder / "swept" / "members").iterdir())
    assert members == ["init_file=plain0", "init_file=plain0+plain1", "init_file=plain1+plain0"]
    curves = [curve(folder / "swept" / "members" / name) for name in members]
    assert curves[1] == pytest.approx(curves[2], rel=1e-5)


def test_a_source_of_another_shape_is_refused_before_the_base_is_read(folder, llama):
    save_file({"virtual_tokens": torch.zeros(2, WIDTH)}, folder / "short.safetensors")
    failed = run_command("train", write(folder, "wrong", llama, ["plain0", "short"]))
    assert failed.returncode == 2 and "short.safetensors holds (2, 32), this prompt is" in failed.stderr
    same = write(folder, "same", llama, ["plain0", "plain0"])
    failed = run_command("train", same)
    assert failed.returncode == 2 and "prompt.init_file" in failed.stderr and "is listed twice" in failed.stderr
