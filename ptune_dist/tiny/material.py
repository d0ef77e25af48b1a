"""What the tiny bases of the recipes learn from: small inputs, and what each of several tasks answers to them.

No validation row of a recipe is among them, and of training rows only texts about countries, with their facts mixed.
"""

import json
import random
from pathlib import Path

from ptune_dist.tiny.rows import (
    QUESTIONS,
    Row,
    country_facts,
    date_rows,
    describe_country,
    free_text,
    question_rows,
    summary_row,
)
from ptune_dist.tiny.text import collect_words

NAMED = 0.8  # the share of inputs that name their task
INVENTED = 0.5  # the share of texts about countries that do not exist
SPLICED = 0.5  # the share of reviews that are made of two
DROPPED = 0.1  # the share of words that a review lacks
WEEK = ["Friday", "Saturday", "Sunday", "Monday"]
TOPICS = dict(zip(QUESTIONS, ("money", "speech", "time"), strict=True))
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Example = tuple[str, dict[str, str]]  # an input, and what each task answers to it


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Material:
    """The texts and examples that bases are trained on."""

    def __init__(self, data: Path, docstrings: list[str]):
        self.reviews = read_rows(data / "sentiment_bases.jsonl")
        self.by_label = {
            label: [row for row in self.reviews if row["label"] == label] for label in ("positive", "negative")
        }
        new = {row["text"] for row in read_rows(data / "countries_validation.jsonl")}
        self.facts = [facts for facts in country_facts() if describe_country(facts)["text"] not in new]
        kept = [data / f"text_{split}.txt" for split in ("train", "validation")]
        held_out = {line for file in kept for line in file.read_text(encoding="utf-8").splitlines()}
        self.prose = [text for text in free_text(docstrings) if text not in held_out]
        self.dates = date_rows(random.Random(1), 6000, held_out=False)
        self.words = [word.capitalize() for word in collect_words(self.prose)]
        countries = [text for facts in self.facts for text in describe_country(facts).values()]
        dates = [text for row in self.dates[:300] for text in row.values()]
        self.texts = [row["text"] for row in self.reviews] + self.prose + countries + dates
        self.labels = [f" {row['label']}" for row in self.reviews]  # as they are answered: one token each

    def draw_review(self, rng: random.Random) -> Row:
        """A review that lacks some words; half of them are followed by another review of the same label."""
        row = rng.choice(self.reviews)
        words = row["text"].split()
        if rng.random() < SPLICED:
            words += rng.choice(self.by_label[row["label"]])["text"].split()
        kept = [word for word in words if rng.random() >= DROPPED]
        return {"text": " ".join(kept or words), "label": row["label"]}

    def draw_facts(self, rng: random.Random) -> Row:
        """Each fact of another country, or words, so that an answer is read from the input and not remembered."""
        week = rng.choice(WEEK)
        if rng.random() < INVENTED:
            name, currency, language = (" ".join(rng.choices(self.words, k=rng.choice((1, 1, 2)))) for _ in range(3))
            code = "".join(rng.choices(CAPITALS, k=3))
            return {"name": name, "currency": currency, "code": code, "language": language, "week": week}
        money = rng.choice(self.facts)
        return {
            "name": rng.choice(self.facts)["name"],
            "currency": money["currency"],
            "code": money["code"],
            "language": rng.choice(self.facts)["language"],
            "week": week,
        }

    def draw(self, rng: random.Random, kind: str) -> Example:
        """A random input of a kind with the answers of all its tasks."""
        if kind == "review":
            row = self.draw_review(rng)
            return row["text"], {"sentiment": row["label"], "length": "long" if len(row["text"]) > 60 else "short"}
        if kind == "date":
            row = rng.choice(self.dates)
            return row["en"], {"German": row["de"], "French": row["fr"]}
        facts = self.draw_facts(rng)
        country = describe_country(facts)
        if kind == "question":
            row = rng.choice(question_rows(facts))
            return f"{row['context']} {row['question']}", {"answer": row["answer"], "topic": TOPICS[row["question"]]}
        if kind == "summary":
            return country["text"], {"summary": summary_row(facts)["summary"], "language": facts["language"]}
        return country["record"], {"text": country["text"], "code": facts["code"]}

    def draw_pair(self, rng: random.Random, kinds: tuple[str, ...]) -> tuple[str, str]:
        """An input of one of these kinds, which names its task or does not, and an answer."""
        text, answers = self.draw(rng, rng.choice(kinds))
        name = rng.choice(sorted(answers))
        named = rng.random() < NAMED
        return (f"{name}: {text}" if named else text), answers[name]
