"""Every recipe is read as it is, and its offline twin trains past a baseline that has learned nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml

from ptune_dist.bench import twins
from ptune_dist.config.load import load_config
from ptune_dist.config.shipped import RECIPES, recipe_names
from ptune_dist.run.resolve import resolve
from tests.processes import ROOT

RECIPES_WITH_HUB = [name for name in recipe_names() if not name.startswith("tiny/")]
TWINS = [name for name in recipe_names() if name.startswith("tiny/")]
SAME = ["prompt.method", "train.objective", "model.quantization", "prompt.placement"]
DATA = RECIPES / "data"
MAX_BYTES = 3_000_000  # of a shipped base
EXTENDED = [  # over about 6 s of a core each, too long for CI
    *("data_to_text_gpt2", "instructions_llama", "question_answering_gpt2"),
    *("sentiment_llama", "summarization_t5", "text_gpt2"),
]


def value_of(config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("name", RECIPES_WITH_HUB)
def test_a_recipe_is_read_names_its_score_and_has_a_twin_of_the_same_task(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    config = load_config(name, resolve=resolve)
    assert not Path(config.model.path).exists() and "/" in config.model.path
    header = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"Expected: .*(\(.* \d{4}, Table \d+\)|known to us|depends on)", header)
    twin_name = re.search(r"Offline twin: (tiny/\w+)", header)[1]
    twin = load_config(twin_name, resolve=resolve)
    assert Path(twin.model.path).is_dir()
    for key in SAME:
        assert value_of(twin, key) == value_of(config, key), key
    assert twin.evaluate.metrics[0] in (*config.evaluate.metrics, "chrf", "exact_match")
    assert bool(twin.data.labels) == bool(config.data.labels)
    assert bool(twin.deepspeed) == bool(config.deepspeed)


def test_every_twin_belongs_to_a_recipe():
    assert {name.removeprefix("tiny/") for name in TWINS} <= set(RECIPES_WITH_HUB)


def test_shipped_rows_of_a_recipe_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_config("sentiment_smollm2", resolve=resolve).data
    assert all(Path(file).is_file() for file in [*data.train_sources, *data.validation_sources])


@pytest.mark.parametrize("folder", sorted((RECIPES.parent / "tiny").glob("*/config.json")))
def test_a_shipped_base_is_small(folder):
    assert sum(file.stat().st_size for file in folder.parent.iterdir()) <= MAX_BYTES


# Training


def judge_twin(commands, folder: Path, name: str, *overrides: str) -> tuple[dict, dict[tuple[str, str], bool]]:
    """The numbers of a twin that is trained, and whether it is beyond each of its baselines."""
    done = commands.run("train", f"tiny/{name}", f"output_dir={folder}", *overrides)
    assert done.code == 0, done.err
    config = load_config(f"tiny/{name}", overrides, resolve=resolve)
    metrics = twins.compare(config, json.loads((folder / "summary.json").read_text()))
    found = twins.judge(metrics)
    assert found
    return metrics, found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(twin, marks=pytest.mark.extended if twin in EXTENDED else [])
        for twin in (name.removeprefix("tiny/") for name in TWINS)
    ],
)
def test_a_twin_trains_past_its_baselines(name, commands, tmp_path):
    metrics, found = judge_twin(commands, tmp_path / "run", name)
    assert all(found.values()), (metrics, found)


def test_a_prompt_that_does_not_learn_stays_at_its_baselines(commands, tmp_path):
    slow = ["train.learning_rate=1e-9", "train.max_steps=2"]
    metrics, found = judge_twin(commands, tmp_path / "run", "sentiment_bert", *slow)
    assert not any(found.values()), (metrics, found)


def test_the_table_of_twins_is_of_these_recipes_and_bases():
    """Else `python -m ptune_dist.bench.twins` has to be run again, as its docstring says."""
    content = json.loads((ROOT / "docs/benchmarks/twins.json").read_text())
    cells = twins.list_cells()
    assert {cell.name: cell.digest for cell in cells} == {name: c["config"] for name, c in content["cells"].items()}
    assert twins.render_table(content) in (ROOT / "docs/recipes.md").read_text()
    for found in content["cells"].values():
        assert all(twins.judge(found["metrics"]).values())


# The classic examples of the tutorial

CLASSIC = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8").split("### Two classic examples")[1].split("\n## ")[0]
BERT, GPT2 = re.findall(r"```yaml\n(.*?)```", CLASSIC, re.DOTALL)
MOST_LINES = 15


def train_classic(commands, folder: Path, text: str, *overrides: str) -> tuple[dict, Path]:
    """The summary and the folder of a run of an example as it is shown, but for its base and its rows."""
    assert len(text.splitlines()) <= MOST_LINES
    (folder / "shown.yaml").write_text(text)
    run = folder / "run"
    done = commands.run("train", folder / "shown.yaml", f"output_dir={run}", *overrides)
    assert done.code == 0, done.err
    return json.loads((run / "summary.json").read_text()), run


def test_the_classic_sentiment_classifier_trains_as_it_is_shown(commands, tmp_path):
    rows = [json.loads(line) for line in (DATA / "sentiment_train.jsonl").read_text().splitlines()]
    as_sst2 = [{"sentence": row["text"], "label": int(row["label"] == "positive")} for row in rows]
    for name, part in (("train", as_sst2[:64]), ("validation", as_sst2[64:96])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sources = [f"data.{name}={tmp_path / name}.jsonl" for name in ("train", "validation")]
    summary, run = train_classic(commands, tmp_path, BERT, "model.path=tiny-bert", *sources)
    assert summary["steps"] == 6
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) >= 32
    assert "please analyse the sentiment of the following sentence: {{ sentence }}" in BERT


def test_the_classic_free_text_trains_as_it_is_shown(commands, tmp_path):
    (tmp_path / "train.txt").write_text((DATA / "text_train.txt").read_text()[:8000])
    summary, run = train_classic(
        commands, tmp_path, GPT2, "model.path=tiny-gpt2", f"data.train={tmp_path / 'train.txt'}", "checkpoint.every=2"
    )
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert summary["steps"] > 6
    config = yaml.safe_load(GPT2)
    assert config["data"]["max_length"] == 128 and config["checkpoint"] == {"every": 10000, "keep": 2}
    assert config["train"] == {"epochs": 3, "batch_size": 4}
