"""Text that is on every machine: words and docstrings of the Python standard library, and character skills on words.

The tiny bases learn several skills at once, each asked for by name before or after the word. No skill is the default,
so a soft prompt has something to select: a minimal setting in which prompt tuning works as on a large base.
"""

import ast
import random
import re
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path

VOWELS = set("aeiou")

# name -> (the answer for a word, the phrases that ask for it)
SKILLS: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "upper": (str.upper, ["upper", "upper case", "in capitals", "loud"]),
    "capital": (str.capitalize, ["capital", "capitalize", "first capital", "as a name"]),
    "reverse": (lambda w: w[::-1], ["reverse", "backwards", "mirror", "from the end"]),
    "vowels": (lambda w: "".join(c for c in w if c in VOWELS) or "-", ["vowels", "only vowels", "the vowels"]),
    "consonants": (lambda w: "".join(c for c in w if c not in VOWELS) or "-", ["consonants", "no vowels", "squeeze"]),
    "length": (lambda w: str(len(w)), ["length", "how long", "number of letters", "count"]),
    "swap": (lambda w: w[-1] + w[1:-1] + w[0], ["swap", "swap ends", "exchange ends"]),
    "double": (lambda w: "".join(c + c for c in w), ["double", "letters twice", "stutter"]),
    "spell": (lambda w: "-".join(w), ["spell", "spell out", "with hyphens", "letter by letter"]),
    "repeat": (lambda w: w + w, ["repeat", "word twice", "say again"]),
    "first": (lambda w: w[:2], ["first", "first two", "start of"]),
    "last": (lambda w: w[-2:], ["last", "last two", "end of"]),
}


def read_docstrings() -> list[str]:
    """Docstrings of the standard library's modules, classes and functions, in a fixed order."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) > 20:
                    found.append(text)
    return found


def collect_words(docstrings: list[str]) -> list[str]:
    """Lower-case words of 3 to 9 letters in the docstrings, sorted."""
    words = set()
    for text in docstrings:
        words.update(re.findall(r"(?<![A-Za-z])[a-z]{3,9}(?![A-Za-z])", text))
    return sorted(words)


def is_held_out(word: str) -> bool:
    """Whether a word is kept from the bases' training on skills: a fifth of the words, which soft prompts use."""
    return zlib.crc32(word.encode()) % 5 == 0


def render_line(rng: random.Random, word: str, name: str) -> str:
    """A line that asks for skill `name`, before or after the word, and answers."""
    answer, phrases = SKILLS[name]
    phrase = rng.choice(phrases)
    if rng.random() < 0.5:
        return f"{phrase}: {word} = {answer(word)}"
    return f"{word}: {phrase} = {answer(word)}"


def render_unnamed_line(rng: random.Random, word: str) -> str:
    """A line that names no skill and is answered by a random one, so that no skill is the default."""
    answer, _ = SKILLS[rng.choice(sorted(SKILLS))]
    return f"{word} = {answer(word)}"


def skill_rows(words: list[str], name: str, seed: int) -> list[dict[str, str]]:
    """Rows {word, answer} of one skill on `words`, shuffled by `seed`."""
    words = list(words)
    random.Random(seed).shuffle(words)
    return [{"word": word, "answer": SKILLS[name][0](word)} for word in words]
