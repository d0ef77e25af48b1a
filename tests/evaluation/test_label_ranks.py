"""Accuracy over labels is the same for any number of ranks, ZeRO stage and size of a micro-batch."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_config
from tests.numerics.test_curves import train_all, zero_json

WORDS = ["short", "a", "some longer text", "words", "of", "prompting", "tokens, many of them, in a row"]
LABELS = ["yes", "yes please", "no", "not at all", "no idea"]
RUNS = {
    "llama": {},
    "infix": {"prompt": {"placement": "infix", "init": "random"}},
    "keys": {"prompt": {"method": "prefix_tuning"}},
    "late": {"prompt": {"method": "late_prompt"}},
    "late_infix": {"prompt": {"method": "late_prompt", "placement": "infix"}},
    "bank": {"sweep": {"train.learning_rate": [0.3, 0.05]}},
    "bloom": {"prompt": {"placement": "infix", "init": "random"}},
    "t5": {},
    "bart": {"prompt": {"placement": "decoder", "init": "random"}},
    "bert": {"data": {"target": "{{ label }}"}},
}


def write_run(folder: Path, name: str, base: Path, **sections) -> tuple[str, list[str]]:
    (folder / name).mkdir(exist_ok=True)
    target = RUNS[name.partition("-")[0]].get("data", {}).get("target", " {{ label }}")
    rows = {which: str(folder / "rows.jsonl") for which in ("train", "validation")}
    data = rows | {"template": "{{ text }}:", "target": target, "labels": LABELS, "max_length": 24}
    settings = {"prompt": {"init": "random"}, "evaluate": {"metrics": ["accuracy"], "num_samples": 0}}
    for key, value in (RUNS[name.partition("-")[0]] | sections).items():
        settings[key] = {**settings.get(key, {}), **value}
    config = write_config(
        folder / name / "config.json",
        output_dir=str(folder / name),
        model={"path": str(base)},
        **settings | {"data": data},
    )
    return str(config), ["train.max_steps=2", "checkpoint.every=0"]


# Each way to read labels once: segments with contexts, keys/values, a sweep, padded calls, and the other families.
@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [["infix", "t5"], pytest.param(list(RUNS), marks=pytest.mark.extended)],
    ids=["some", "all"],
)
def test_labels_over_ranks_and_in_small_parts_have_the_losses_of_one_rank(tiny_bases, tmp_path, names):
    lines = [json.dumps({"text": word, "label": LABELS[i % len(LABELS)]}) for i, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")  # the longest rows are cut, long labels leave less
    bases = {name: tiny_bases[name if name in tiny_bases else "llama"] for name in names}
    alone = [write_run(tmp_path, name, base) for name, base in bases.items()]
    alone.append(write_run(tmp_path, "infix-loss", bases["infix"], evaluate={"metrics": ["loss"]}))
    runs = train_all(alone, tmp_path, num_ranks=1)
    sharded = {"deepspeed": zero_json(3), "train": {"micro_batch_tokens": 40}}
    wide = [write_run(tmp_path, f"{name}-wide", base, **sharded) for name, base in bases.items()]
    runs |= train_all(wide, tmp_path, num_ranks=2)

    def found(name: str) -> dict[str, float]:
        return json.loads((runs[name] / "summary.json").read_text())["validation"]

    for name in names:
        assert found(f"{name}-wide") == pytest.approx(found(name), rel=1e-5), name
    assert found("infix-loss")["loss"] == pytest.approx(found("infix")["loss"], rel=1e-5)
    assert len({found(name)["loss"] for name in names}) >= len(names) - 1
