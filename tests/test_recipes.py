"""Every recipe is read as it is, and its offline twin trains past a baseline that has learned nothing."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ptune_dist.config.load import load_config
from ptune_dist.config.shipped import RECIPES, recipe_names
from ptune_dist.data.template import compile_template
from ptune_dist.metrics import METRICS
from ptune_dist.run.resolve import resolve
from tests.processes import ROOT

RECIPES_WITH_HUB = [name for name in recipe_names() if not name.startswith("tiny/") and name != "sentiment_smollm2"]
TWINS = [name for name in recipe_names() if name.startswith("tiny/")]
SAME = ["prompt.method", "train.objective", "model.quantization", "prompt.placement"]
DATA = RECIPES / "data"
MAX_BYTES = 3_000_000  # of a shipped base
EXTENDED = ["data_to_text_gpt2", "instructions_llama", "sentiment_llama", "summarization_t5"]  # too long for CI
# Beyond a baseline: of 100, a share of its own value, or 0.05 of a metric between 0 and 1.
MARGINS = {"chrf": 10.0, "bleu": 10.0}
SHARES = {"mse": 0.1, "loss": 0.05, "perplexity": 0.05}


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
    assert {name.removeprefix("tiny/") for name in TWINS} == set(RECIPES_WITH_HUB)


@pytest.mark.parametrize("folder", sorted((RECIPES.parent / "tiny").glob("*/config.json")))
def test_a_shipped_base_is_small(folder):
    assert sum(file.stat().st_size for file in folder.parent.iterdir()) <= MAX_BYTES


# Training


def render_rows(config) -> tuple[list[str], list[str]]:
    """Inputs and targets of the validation rows that are evaluated."""
    lines = Path(config.data.validation_sources[0]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: config.evaluate.max_examples or None]]
    inputs = compile_template(config.data.template, key="data.template")
    targets = compile_template(config.data.target, key="data.target")
    return [inputs.render(row).strip() for row in rows], [targets.render(row).strip() for row in rows]


def answers_without_learning(config, needs: str) -> tuple[list[list], list]:
    """What could be answered to each row without learning, and the targets.

    A copy of the input, or the answer that is best for all rows: their commonest target, or of numbers their mean.
    """
    inputs, targets = render_rows(config)
    if needs == "values":
        numbers = [float(target) for target in targets]
        return [[sum(numbers) / len(numbers)] * len(numbers)], numbers
    commonest = [Counter(targets).most_common(1)[0][0]] * len(targets)
    return ([commonest] if needs == "label_losses" else [commonest, inputs]), targets


def baselines_of(config, summary: dict) -> list[tuple[str, str, float]]:
    """What a twin is compared with: a baseline, a metric, and the baseline's number.

    The untrained prompt and the base alone; with labels by the loss of the whole answer, because a base may rank them
    well that would answer something else. And answers without learning, by the first metric.
    """
    metric = config.evaluate.metrics[0]
    needs = METRICS[metric].needs
    learned = "loss" if needs == "label_losses" else metric
    stages = {"untrained prompt": summary["before"], "base": summary["base_without_prompt"]}
    found = [(stage, learned, numbers[learned]) for stage, numbers in stages.items() if learned in numbers]
    if needs == "losses":
        return found
    candidates, targets = answers_without_learning(config, needs)
    for answers in candidates:
        found.append(("no learning", metric, METRICS[metric].compute(answers, [[target] for target in targets])))
    return found


def is_beyond(metric: str, value: float, baseline: float) -> bool:
    margin = abs(baseline) * SHARES[metric] if metric in SHARES else MARGINS.get(metric, 0.05)
    return value > baseline + margin if METRICS[metric].higher_is_better else value < baseline - margin


def judge_twin(commands, folder: Path, name: str, *overrides: str) -> dict[tuple, bool]:
    """Whether a twin that is trained is beyond each of its baselines."""
    done = commands.run("train", f"tiny/{name}", f"output_dir={folder}", *overrides)
    assert done.code == 0, done.err
    config = load_config(f"tiny/{name}", overrides, resolve=resolve)
    summary = json.loads((folder / "summary.json").read_text())
    found = baselines_of(config, summary)
    assert len(found) >= 1
    values = summary["validation"]
    return {(*line, values[line[1]]): is_beyond(line[1], values[line[1]], line[2]) for line in found}


@pytest.mark.parametrize(
    "name",
    [pytest.param(twin, marks=pytest.mark.extended if twin in EXTENDED else []) for twin in RECIPES_WITH_HUB],
)
def test_a_twin_trains_past_its_baselines(name, commands, tmp_path):
    found = judge_twin(commands, tmp_path / "run", name)
    print(name, found)
    assert all(found.values()), found


def test_a_prompt_that_does_not_learn_stays_at_its_baselines(commands, tmp_path):
    slow = ["train.learning_rate=1e-9", "train.max_steps=2"]
    found = judge_twin(commands, tmp_path / "run", "sentiment_bert", *slow)
    assert not any(found.values()), found


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
