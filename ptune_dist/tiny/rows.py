"""Write the small real data of the recipes' offline twins: `python -m ptune_dist.tiny.rows` (a few seconds).

Dates, countries, questions about them and their summaries come from Unicode's CLDR through babel (Unicode License v3),
free text and words from docstrings of the Python standard library (PSF License). The reviews are committed as they are.
Another release of Python or of babel has other texts, so the committed files are what tests and twins use.
"""

import argparse
import datetime
import json
import random
import zlib
from pathlib import Path
from typing import Any

from babel import Locale, UnknownLocaleError
from babel.dates import format_date
from babel.languages import get_official_languages
from babel.numbers import get_currency_name, get_territory_currencies

from ptune_dist.tiny.text import SKILLS, collect_words, is_held_out, read_docstrings

Row = dict[str, str]
DATE_LOCALES = ("en", "de", "fr")
FIRST_DAY = datetime.date(1970, 1, 1).toordinal()
NUM_DAYS = 27_000  # to 2043
QUESTIONS = {
    "What is the currency code?": "code",
    "Which language is official?": "language",
    "When does the week start?": "week",
}
INSTRUCTIONS = {
    "upper": "Write the word in big letters",
    "reverse": "Turn the word around",
    "length": "Say how many letters the word has",
    "double": "Write each letter of the word two times",
    "vowels": "Keep the vowels of the word and nothing else",
    "first": "Say how the word begins",
}


def chosen(text: str, share: int) -> bool:
    """Whether a text is one of every `share` that are held out, which does not depend on the other texts."""
    return zlib.crc32(text.encode()) % share == 0


def date_row(ordinal: int) -> Row:
    """A date in full, in each of DATE_LOCALES."""
    date = datetime.date.fromordinal(ordinal)
    return {locale: format_date(date, "full", locale) for locale in DATE_LOCALES}


def date_rows(rng: random.Random, num_rows: int, *, held_out: bool) -> list[Row]:
    """Different dates of the recipes: those that are held out from the bases (an eighth), or the others."""
    days = [day for day in range(FIRST_DAY, FIRST_DAY + NUM_DAYS) if chosen(str(day), 8) == held_out]
    return [date_row(day) for day in rng.sample(days, num_rows)]


def country_facts() -> list[Row]:
    """Name, currency, its code, an official language and the first day of the week, of every country that has them."""
    english = Locale("en")
    rows = []
    for code, name in sorted(english.territories.items()):
        if not (len(code) == 2 and code.isalpha()):
            continue
        currencies = get_territory_currencies(code)
        languages = [english.languages.get(language) for language in get_official_languages(code)]
        if not currencies or not languages or languages[0] is None:
            continue
        try:
            locale = Locale.parse(f"{get_official_languages(code)[0]}_{code}")
        except UnknownLocaleError:
            continue
        rows.append(
            {
                "name": name,
                "currency": get_currency_name(currencies[0], locale="en"),
                "code": currencies[0],
                "language": languages[0],
                "week": english.days["format"]["wide"][locale.first_week_day],
            }
        )
    return rows


def describe_country(facts: Row) -> Row:
    """The facts, as a record of `name[value]` pairs and as a text."""
    record = ", ".join(f"{key}[{value}]" for key, value in facts.items())
    text = (
        f"The currency of {facts['name']} is the {facts['currency']} ({facts['code']}). "
        f"{facts['language']} is an official language. The week starts on {facts['week']}."
    )
    return {"record": record, "text": text}


def question_rows(facts: Row) -> list[Row]:
    """A question about each fact of a country, with the text that answers it."""
    context = describe_country(facts)["text"]
    return [{"context": context, "question": q, "answer": facts[key]} for q, key in QUESTIONS.items()]


def summary_row(facts: Row) -> Row:
    """The text about a country, and the three facts of it that a traveler asks for."""
    summary = f"{facts['language']}, {facts['code']}, weeks from {facts['week']}"
    return {"text": describe_country(facts)["text"], "summary": summary}


def free_text(docstrings: list[str]) -> list[str]:
    """Docstrings of several sentences, each in one line."""
    texts = {" ".join(docstring.split()) for docstring in docstrings if 200 <= len(docstring) <= 700}
    return sorted(text for text in texts if text.isascii())


def instruction_rows(words: list[str], rng: random.Random) -> list[Row]:
    """An instruction for each word, in words that the tiny causal base has not seen, and what it asks for."""
    rows = []
    for word in words:
        skill = rng.choice(sorted(INSTRUCTIONS))
        rows.append({"instruction": INSTRUCTIONS[skill], "input": word, "output": SKILLS[skill][0](word)})
    return rows


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_rows(path: Path, rows: list[Any]) -> None:
    write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def write_split(folder: Path, name: str, train: list[Any], validation: list[Any]) -> None:
    write_rows(folder / f"{name}_train.jsonl", train)
    write_rows(folder / f"{name}_validation.jsonl", validation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("configs/recipes/data"))
    args = parser.parse_args()
    rng = random.Random(0)
    docstrings = read_docstrings()

    dates = [{key: row[key] for key in ("en", "de")} for row in date_rows(rng, 600, held_out=True)]
    write_split(args.out, "dates", dates[:400], dates[400:])

    facts = country_facts()
    rng.shuffle(facts)
    new, known = facts[:60], facts[60:]
    write_split(args.out, "countries", [describe_country(row) for row in known], [describe_country(row) for row in new])
    write_split(args.out, "summaries", [summary_row(row) for row in known], [summary_row(row) for row in new])
    questions = [row for country in known for row in question_rows(country)]
    write_split(args.out, "questions", questions, [row for country in new for row in question_rows(country)])

    texts = free_text(docstrings)
    rng.shuffle(texts)
    write_lines(args.out / "text_train.txt", texts[:160])
    write_lines(args.out / "text_validation.txt", texts[160:220])

    words = [word for word in collect_words(docstrings) if is_held_out(word)]
    rng.shuffle(words)
    write_split(args.out, "instructions", instruction_rows(words[:480], rng), instruction_rows(words[480:600], rng))


if __name__ == "__main__":
    main()
