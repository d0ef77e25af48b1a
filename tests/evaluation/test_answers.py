"""Answers of a trained run: labels with probabilities, plain text, whitespace, and how long they may become."""

import json
import math
from pathlib import Path

import pytest

from tests.conftest import write_config

LABELS = ["yes", "no", "not at all"]
LONG = "the quick brown fox jumps over the lazy dog"


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def labeled(commands, tmp_path_factory) -> Path:
    """A run over rows with labels, of which the validation rows have one each."""
    folder = tmp_path_factory.mktemp("labeled")
    rows = [{"text": f"word {i}", "label": LABELS[i % 3]} for i in range(12)]
    data = {which: write_rows(folder / f"{which}.jsonl", rows) for which in ("train", "validation")}
    data |= {"template": "{{ text }}:", "target": " {{ label }}", "labels": LABELS}
    train = {"max_steps": 8, "batch_size": 12}
    config = write_config(folder / "c.json", data=data, train=train, evaluate={"metrics": ["accuracy"]})
    assert commands.run("train", config).code == 0
    return folder / "run"


def test_labels_are_chosen_with_the_probabilities_that_accuracy_counts(commands, labeled):
    done = commands.run("generate", labeled, "--input-file", labeled.parent / "validation.jsonl", "--labels")
    assert done.code == 0, done.err
    rows = read_rows(done.out)
    assert [row["text"] for row in rows] == [f"word {i}" for i in range(12)]
    for row in rows:
        found = row["probabilities"]
        assert list(found) == LABELS and math.isclose(sum(found.values()), 1, rel_tol=1e-9)
        assert row["generated"] == max(found, key=found.get)
    accuracy = json.loads((labeled / "summary.json").read_text())["validation"]["accuracy"]
    assert sum(row["generated"] == row["label"] for row in rows) / len(rows) == pytest.approx(accuracy)


def test_a_text_alone_has_the_probabilities_of_its_row(commands, labeled):
    file = commands.run("generate", labeled, "--input-file", labeled.parent / "validation.jsonl", "--labels")
    (alone,) = read_rows(commands.run("generate", labeled, "--input", "word 4", "--labels").out)
    assert alone["probabilities"] == pytest.approx(read_rows(file.out)[4]["probabilities"], rel=1e-5)
    bare = labeled.parent / "bare.jsonl"
    write_rows(bare, [{"text": "word 4"}])
    (again,) = read_rows(commands.run("generate", labeled, "--input-file", bare, "--labels").out)
    assert again["probabilities"] == alone["probabilities"]


def test_answers_have_no_whitespace_at_their_ends_and_follow_the_longest_target(commands, labeled):
    done = commands.run("generate", labeled, "--input-file", labeled.parent / "validation.jsonl")
    answers = [row["generated"] for row in read_rows(done.out)]
    samples = json.loads((labeled / "summary.json").read_text())["samples"]
    for sample, answer in zip(samples, answers, strict=False):  # shown ones may be longer
        assert sample["trained"].startswith(answer)
    assert answers == [answer.strip() for answer in answers] and any(answers)
    assert max(map(len, answers)) <= len(" not at all") + 1  # not 32, as of answers that nothing is known about
    facts = json.loads((labeled / "prompt" / "prompt.json").read_text())
    assert facts["longest_target"] == len(" not at all") + 1  # one token for each character, and the end


def test_labels_may_be_named_and_rows_that_say_what_is_right_are_scored(commands, labeled):
    file = labeled.parent / "validation.jsonl"
    metrics = "evaluate.metrics=[exact_match, loss]"
    done = commands.run("generate", labeled, "--labels", "yes,no", "--input-file", file, "evaluate.metrics=[accuracy]")
    for row in read_rows(done.out):
        assert list(row["probabilities"]) == ["yes", "no"] and row["gold"] == row["gold_label"] == row["label"]
        assert row["accuracy"] == float(row["generated"] == row["label"])
    written = commands.run("generate", labeled, "--input-file", file, metrics)
    assert all(row["exact_match"] == float(row["generated"] == row["gold"]) for row in read_rows(written.out))
    out = labeled.parent / "evaluated.jsonl"
    names = ",".join(LABELS)
    done = commands.run("evaluate", labeled, "--labels", names, metrics, "data.labels=null", "--output", out)
    rows = read_rows(out.read_text())
    accuracy = json.loads((labeled / "summary.json").read_text())["validation"]["accuracy"]
    assert json.loads(done.out)["accuracy"] == pytest.approx(accuracy)
    assert sum(row["accuracy"] for row in rows) / len(rows) == pytest.approx(accuracy)
    assert all(row["gold_label"] in row["probabilities"] for row in rows)


def test_labels_are_asked_for_where_there_are_none(commands, labeled):
    done = commands.run("generate", labeled, "--input", "a", "--labels", "data.labels=null", "evaluate.metrics=[loss]")
    assert done.code == 2 and "--labels: the run's config has no data.labels" in done.errors[0]


def test_rows_that_are_read_are_not_written_over(commands, labeled):
    rows = labeled.parent / "validation.jsonl"
    before = rows.read_text()
    symbolic = labeled.parent / "link.jsonl"
    hard = labeled.parent / "hard.jsonl"
    symbolic.symlink_to(rows)
    hard.hardlink_to(rows)
    for output in (rows, symbolic, hard):
        done = commands.run("generate", labeled, "--input-file", rows, "--output", output)
        assert done.code == 2 and f"--output: {output} is the file of --input-file" in done.errors[0]
    done = commands.run("generate", labeled, "--input", "a", "--output", labeled.parent / "train.jsonl")
    assert done.code == 2 and "is the file of data.train" in done.errors[0]
    assert rows.read_text() == before


def test_an_export_does_not_mix_with_other_files(commands, labeled, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # an earlier export of this kind is replaced
        assert commands.run("export", labeled, "--to", "peft", "--out", out).code == 0
    refused = commands.run("export", labeled, "--to", "prompt-embeds", "--out", out)
    assert refused.code == 2 and f"--out: {out} holds adapter_config.json" in refused.errors[0]
    (out / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused = commands.run("export", labeled, "--to", "peft", "--out", out)
    assert refused.code == 2 and "holds a PEFT adapter of type LORA" in refused.errors[0]
    refused = commands.run("export", labeled, "--to", "peft", "--out", labeled / "prompt")
    assert refused.code == 2 and "choose an empty or a new folder" in refused.errors[0]


@pytest.fixture(scope="module")
def plain(commands, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "a.txt").write_text("".join(f"{LONG}, {i}\n" for i in range(20)))
    data = {"train": str(folder / "a.txt"), "validation": str(folder / "a.txt"), "template": None, "target": None}
    config = write_config(folder / "c.json", data=data, train={"max_steps": 2, "batch_size": 4})
    assert commands.run("train", config).code == 0
    return folder / "run"


def test_a_prompt_for_plain_text_continues_the_given_text(commands, plain, tmp_path):
    samples = json.loads((plain / "summary.json").read_text())["samples"]
    assert len(samples) == 5 and all(sample["trained"] and sample["wanted"] for sample in samples)
    assert samples[0]["input"] == LONG[:32].strip()
    prediction = json.loads((plain / "predictions.jsonl").read_text().splitlines()[0])
    assert (prediction["input"], prediction["continuation"]) == (samples[0]["input"], samples[0]["wanted"])
    (tmp_path / "in.txt").write_text("the quick\nbrown fox")
    write_rows(tmp_path / "in.jsonl", [{"text": "the quick"}, {"text": "brown fox"}])
    found = []
    for name in ("in.txt", "in.jsonl"):
        done = commands.run("generate", plain, "--input-file", tmp_path / name)
        assert done.code == 0, done.err
        found.append([row["generated"] for row in read_rows(done.out)])
    (alone,) = read_rows(commands.run("generate", plain, "--input", "the quick").out)
    assert found[0] == found[1] and alone["generated"] == found[0][0]


def test_a_prompt_for_plain_text_is_exported_with_the_text_after_it(commands, plain, tmp_path):
    from safetensors.torch import load_file

    done = commands.run("export", plain, "--to", "prompt-embeds", "--out", tmp_path / "out", "--input", "quick")
    assert done.code == 0, done.err
    tensors = load_file(tmp_path / "out" / "prompt_embeds.safetensors")
    assert len(tensors["prompt_embeds.0"]) == 4 + len("quick")
    assert tensors["prompt_embeds.0"][:4].equal(tensors["virtual_tokens"])


def test_answers_are_as_long_as_the_longest_target_where_they_are_compared(commands, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": "a", "a": LONG}, {"q": "b", "a": "short"}])
    data = {"train": rows, "validation": rows, "template": "{{ q }}", "target": "{{ a }}"}
    train = {"max_steps": 1, "batch_size": 2}
    config = write_config(tmp_path / "c.json", data=data, train=train, evaluate={"metrics": ["exact_match"]})
    assert commands.run("train", config).code == 0
    answers = [sample["trained"] for sample in json.loads((tmp_path / "run" / "summary.json").read_text())["samples"]]
    assert max(map(len, answers)) > 32, answers


def test_the_longest_example_follows_the_base(commands, tiny_bases, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 300, "label": "no"}, {"text": "b", "label": "yes"}])
    data = {"train": rows, "template": "{{ text }}", "target": "{{ label }}", "labels": ["no", "yes"]}
    train = {"max_steps": 2, "batch_size": 2}
    config = write_config(
        tmp_path / "c.json", data=data | {"max_length": None}, train=train, model={"path": str(tiny_bases["bert"])}
    )
    done = commands.run("train", config, "train.max_steps=1")
    assert done.code == 0, done.err
    assert "max_length: 124\n" in (tmp_path / "run" / "config.yaml").read_text()  # 128 positions, 4 virtual tokens
    assert commands.run("train", config).code == 0  # resumed with the number left out again
    refused = commands.run("validate", config, "data.max_length=128", f"output_dir={tmp_path}/other")
    assert refused.code == 2 and "the base has 128: set data.max_length=124" in refused.errors[0]
    refused = commands.run("validate", config, "prompt.num_virtual_tokens=128", f"output_dir={tmp_path}/other")
    assert refused.code == 2 and "leave no position for the rows" in refused.errors[0]
