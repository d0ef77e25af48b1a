"""A benchmark's matrix: named sides, each a command line, over cases that fill in the commands' placeholders.

A side's command is run by no shell. It leaves its figures as one flat JSON object at the path that stands for
`{result}`: numbers are measures, anything else (a loss curve) is kept as it is.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from ptune_dist.config.schema import NotNegative, Positive, Section
from ptune_dist.config.yaml_file import read_yaml
from ptune_dist.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]  # names files
# What every command may use beside `values`: the interpreter, where to leave the result, a scratch folder of this one
# run, the folder that all runs of the benchmark share, and which repeat this is (0, 1, ...).
BUILT_IN = ("python", "result", "work", "shared", "repeat")


class Agreement(Section):
    """All sides must report the same `measure`, a number or a list of numbers."""

    measure: str
    tolerance: Annotated[float, Field(gt=0)]  # largest absolute difference


class Case(Section):
    name: Name
    about: str = ""
    values: dict[str, str | int | float] = {}  # placeholder -> what stands for it in the commands
    sides: list[str] | None = None  # some of the matrix's sides; all where left out
    repeats: Positive | None = None
    warm_up: NotNegative | None = None
    agree: Agreement | None = None


class Matrix(Section):
    name: Name
    about: str = ""
    sides: dict[Name, str]  # name -> command
    baseline: str | None = None  # the side that the others are compared with
    cases: Annotated[list[Case], Field(min_length=1)]
    repeats: Positive = 3
    warm_up: NotNegative = 0  # runs of every side before those that count
    environment: dict[str, str] = {}  # set for every command
    prepare: list[str] = []  # commands run once, first
    timeout_s: Positive = 1800  # of one command
    quiet_wait_s: NotNegative = 0  # before each run, wait so long at most for other work on the machine to pause

    @model_validator(mode="after")
    def check_names(self) -> "Matrix":
        used = [self.baseline] if self.baseline else []
        used += [side for case in self.cases for side in case.sides or []]
        for side in used:
            if side not in self.sides:
                raise ValueError(f"{side!r} is not among the sides: {', '.join(self.sides)}")
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError("cases: two cases have one name")
        return self

    def sides_of(self, case: Case) -> list[str]:
        return case.sides if case.sides is not None else list(self.sides)


def load_matrix(path: str | Path) -> Matrix:
    """Read and check a matrix. Raises UserError naming the file and the key."""
    try:
        matrix = Matrix.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from None
    filler = dict.fromkeys(BUILT_IN, "x")
    for command in matrix.prepare:
        fill_command(command, filler, f"{path}: prepare")
    for case in matrix.cases:
        for side in matrix.sides_of(case):
            fill_command(matrix.sides[side], case.values | filler, f"{path}: case {case.name}: sides.{side}")
    return matrix


def describe(error: ValidationError) -> str:
    """The first thing wrong with a matrix, in one line."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        section = Case if first["loc"][0] == "cases" and len(first["loc"]) == 3 else Matrix
        known = Agreement if "agree" in first["loc"][:-1] else section
        return f"unknown key {key}, known here: {', '.join(known.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")


def fill_command(command: str, values: dict[str, object], where: str) -> list[str]:
    """The words of a command with every `{name}` replaced, those that stand in a case's values too.

    Braces around anything but a name stay. Raises UserError.
    """

    def replace(match: re.Match) -> str:
        name = match[1]
        if name not in values:
            raise UserError(f"{where}: {{{name}}} stands for nothing, known here: {', '.join(values)}")
        return shlex.quote(str(values[name])) if name in BUILT_IN else str(values[name])

    pattern = r"\{([a-z][a-z0-9_]*)\}"
    try:
        words = shlex.split(re.sub(pattern, replace, re.sub(pattern, replace, command)))
    except ValueError as error:
        raise UserError(f"{where}: {error} in {command!r}") from None
    if not words:
        raise UserError(f"{where}: the command is empty")
    return words


def built_in_values(*, result: Path | None, work: Path, shared: Path, repeat: int) -> dict[str, object]:
    """What the placeholders of BUILT_IN stand for in one run."""
    return {"python": sys.executable, "result": result or "", "work": work, "shared": shared, "repeat": repeat}
