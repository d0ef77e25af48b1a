"""The section `prompt.text`: a written prompt, and where it stands."""

import re
from typing import NamedTuple

from pydantic import model_validator

from ptune_dist.config.fields import Section

PARTS = ("task", "input", "output")
PLACE = re.compile(r"\{\{-?\s*template\s*-?\}\}")  # where data.template stands
JINJA = re.compile(r"\{[{%#]")


class Around(NamedTuple):
    """Texts around `data.template` as jinja2, each with its key: those before it, and those after it.

    A line break stands between two texts of a side. joins: none stands between the template and the texts beside it.
    """

    before: tuple[tuple[str, str], ...] = ()
    after: tuple[tuple[str, str], ...] = ()
    joins: bool = False

    def head(self, line_break: str = "\n") -> str:
        """What stands before the template, up to where it begins."""
        end = line_break if self.before and not self.joins else ""
        return line_break.join(text for _, text in self.before) + end

    def tail(self, line_break: str = "\n") -> str:
        """What stands after the template, from its end on."""
        begin = line_break if self.after and not self.joins else ""
        return begin + line_break.join(text for _, text in self.after)

    @property
    def beginning(self) -> str:
        """What every row begins with: the head up to its first column."""
        return JINJA.split(self.head(), maxsplit=1)[0]


class TextConfig(Section):
    """A written prompt, in parts: each is jinja2 over the columns of a row, as `data.template` is."""

    task: str | None = None
    """What is to be done. It stands before the input."""

    input: str | None = None
    """What the input is. It stands before `data.template`, or around it where it has `{{ template }}`."""

    output: str | None = None
    """What the answer is. It stands after `data.template`, so the target continues it; or around `data.template` where
    it has `{{ template }}`."""

    @model_validator(mode="after")
    def check_parts(self) -> "TextConfig":
        if not self.parts():
            raise ValueError("prompt.text is empty: give task, input or output, or leave it out")
        places = [name for name, text in self.parts().items() for _ in PLACE.findall(text)]
        if len(places) > 1:
            raise ValueError(f"prompt.text.{places[1]}: {{{{ template }}}} stands in prompt.text more than once")
        return self

    def parts(self) -> dict[str, str]:
        """The parts that are given, without line breaks at either end."""
        given = {name: (getattr(self, name) or "").strip("\n") for name in PARTS}
        return {name: text for name, text in given.items() if text.strip()}

    def has_place(self) -> bool:
        """Whether a part says where data.template stands."""
        return any(PLACE.search(text) for text in self.parts().values())

    def around(self) -> Around:
        """The parts by where they stand: task and input before data.template, output after, but for PLACE."""
        parts = [(f"prompt.text.{name}", text) for name, text in self.parts().items()]
        for number, (key, text) in enumerate(parts):
            place = PLACE.search(text)
            if place is not None:  # a half may be empty: a line break still stands beside it
                before = (*parts[:number], (key, text[: place.start()]))
                after = ((key, text[place.end() :]), *parts[number + 1 :])
                return Around(before, after, joins=True)
        is_output = [key.endswith(".output") for key, _ in parts]
        before = tuple(part for part, is_after in zip(parts, is_output, strict=True) if not is_after)
        after = tuple(part for part, is_after in zip(parts, is_output, strict=True) if is_after)
        return Around(before, after)

    def split_task(self) -> tuple[str, Around]:
        """The task where it is the same for every row, and what else stands around the template of each."""
        around = self.around()
        task = self.parts().get("task", "")
        if not task or JINJA.search(task):
            return "", around
        return task, Around(around.before[1:], around.after, around.joins)
