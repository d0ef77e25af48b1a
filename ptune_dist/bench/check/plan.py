"""The parts of a check, read from a YAML file and expanded into steps: one step is one command with a result JSON.

A part has either a command of its own or some cases of a benchmark matrix; there each run of a side is a step. The
placeholders of commands are those of matrices, with `gpus` (how many there are, at least 1), `out` (the folder of the
check) and `before` (a JSON file with what this step had found when an earlier call cut it). Values from the file's
`tiny` section replace all others when there is no GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from ptune_dist.bench.matrix import Case, Matrix, Name, fill_command, load_matrix
from ptune_dist.config.schema import Section
from ptune_dist.config.yaml_file import read_yaml
from ptune_dist.errors import UserError

Values = dict[str, str | int | float]
BUILT_IN = ("python", "result", "work", "shared", "repeat", "gpus", "out", "before")


class PartSection(Section):
    name: Name
    about: str
    minutes: Annotated[float, Field(gt=0)]  # of one step on an H100
    values: Values = {}
    prepare: list[str] = []
    command: str | None = None
    matrix: str | None = None
    cases: list[str] = []  # of the matrix; default: all
    published: dict[str, float] = {}  # label -> tokens/s of others, with which the part is compared

    @model_validator(mode="after")
    def check_kind(self) -> "PartSection":
        if (self.command is None) == (self.matrix is None):
            raise ValueError(f"part {self.name}: give either command or matrix")
        return self


class CheckSection(Section):
    values: Values  # placeholder -> its replacement, for every part
    tiny: Values  # replaces any other value if there is no GPU
    tiny_minutes: Annotated[float, Field(gt=0)]  # of any step with tiny values
    parts: Annotated[list[PartSection], Field(min_length=1)]


@dataclass(frozen=True)
class Step:
    """One command. `side` and `case` are those of a matrix."""

    name: str
    command: str
    values: Values
    minutes: float
    case: Case | None = None
    side: str = ""
    repeat: int = 0

    def words(self, built_in: Mapping[str, object]) -> list[str]:
        """The command line; `built_in` are the values of BUILT_IN. Raises UserError."""
        return fill_command(self.command, self.values | dict(built_in) | {"repeat": self.repeat}, self.name)


@dataclass(frozen=True)
class Part:
    """A part's steps, and the commands that must have run before any of them."""

    name: str
    about: str
    steps: list[Step]
    prepare: list[Step] = field(default_factory=list)
    matrix: Matrix | None = None
    published: dict[str, float] = field(default_factory=dict)


def load_parts(path: Path, *, is_tiny: bool, changes: Values, num_repeats: int) -> list[Part]:
    """The parts in order. `changes` replace any other value. Raises UserError that names the file and the key."""
    try:
        content = CheckSection.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    unknown = sorted(set(changes) - set(content.values))
    if unknown:
        raise UserError(f"--set {unknown[0]}: not a value of {path}, known there: {', '.join(content.values)}")
    last = (content.tiny if is_tiny else {}) | changes
    return [build_part(content, section, last, is_tiny, num_repeats) for section in content.parts]


def build_part(content: CheckSection, section: PartSection, last: Values, is_tiny: bool, num_repeats: int) -> Part:
    minutes = content.tiny_minutes if is_tiny else section.minutes
    first = content.values | section.values
    matrix = load_matrix(section.matrix, also=BUILT_IN + tuple(first)) if section.matrix else None
    steps = []
    if section.command is not None:
        steps.append(Step(section.name, section.command, first | last, minutes))
    if matrix:
        steps = matrix_steps(matrix, section, first, last, minutes, num_repeats)
    commands = [*section.prepare, *(matrix.prepare if matrix else [])]
    prepare = [Step(f"prepare {command}", command, first | last, content.tiny_minutes) for command in commands]
    published = {} if is_tiny else section.published
    return Part(section.name, section.about, steps, prepare, matrix, published)


def matrix_steps(
    matrix: Matrix, section: PartSection, first: Values, last: Values, minutes: float, num_repeats: int
) -> list[Step]:
    """All runs of the chosen cases: the first repeat of each before the second of any. Raises UserError."""
    cases = {case.name: case for case in matrix.cases}
    for name in section.cases:
        if name not in cases:
            raise UserError(f"part {section.name}: {section.matrix} has no case {name}: it has {', '.join(cases)}")
    chosen = [cases[name] for name in section.cases or cases]
    steps = []
    for repeat in range(num_repeats):
        for case in chosen:
            for side in matrix.sides_of(case):
                name = f"{case.name}-{side}-{repeat}"
                values = first | case.values | last
                steps.append(Step(name, matrix.sides[side], values, minutes, case, side, repeat))
    return steps


def select_parts(parts: list[Part], names: str | None) -> list[Part]:
    """The parts in a comma-separated list, all if it is None. Raises UserError."""
    if names is None:
        return parts
    known = {part.name: part for part in parts}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UserError(f"--parts: no part {name}, known: {', '.join(known)}")
    return [part for part in parts if part.name in wanted]
