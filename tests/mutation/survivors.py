"""What is known of mutants that no test kills, from `survivors.md`.

Its sections of level 2 are `Equivalent`, for mutants that do what the code does, and `Not killed`, for faults that no
test finds. Sections of level 3 are paths. An entry is a block ```diff with a mutant's difference, and the reason.
"""

import re
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("survivors.md")
ENTRY = re.compile(r"^(##[^\n]+)$|^```diff\n(.+?)\n```\n\n(.+?)(?=\n\n|\n*\Z)", re.MULTILINE | re.DOTALL)
KINDS = {"Equivalent": "equivalent", "Not killed": "survived"}


class Survivor(NamedTuple):
    """kind: equivalent or survived. difference: as a mutant's. why: one paragraph."""

    kind: str
    path: str
    difference: str
    why: str


def read_survivors(text: str) -> list[Survivor]:
    found: list[Survivor] = []
    kind = path = ""
    for heading, difference, why in ENTRY.findall(text):
        if heading.startswith("## "):
            kind = KINDS[heading[3:].strip()]
        elif heading:
            path = heading[4:].strip()
        else:
            found.append(Survivor(kind, path, difference.strip(), " ".join(why.split())))
    return found


def load_survivors() -> dict[tuple[str, str], Survivor]:
    """By path and difference."""
    return {(one.path, one.difference): one for one in read_survivors(FILE.read_text(encoding="utf-8"))}
