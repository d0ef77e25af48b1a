"""The matrix of a benchmark: named sides, each a command line, and cases that fill in the placeholders of commands.

Commands are run without a shell. A side writes its figures as one flat JSON object to the path that replaces
`{result}`: numbers are measures, and anything else (a loss curve) is stored unchanged.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from ptune_dist.config.schema import NotNegative, Positive, Section
from ptune_dist.config.yaml_file import read_yaml
from ptune_dist.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]  # used in file names
# Placeholders of every command in addition to `values`: the interpreter, the path of the result, a scratch folder of
# this run, a folder shared by all runs of the benchmark, and the number of the repeat (from 0).
BUILT_IN = ("python", "result", "work", "shared", "repeat")


class Agreement(Section):
    """All sides must report the same value of `measure`, a number or a list of numbers."""

    measure: str
    tolerance: Annotated[float, Field(gt=0)]  # largest absolute difference


class Case(Section):
    name: Name
    about: str = ""
    values: dict[str, str | int | float] = {}  # placeholder -> its replacement in the commands
    sides: list[str] | None = None  # a subset of the matrix's sides; default: all
    repeats: Positive | None = None
    warm_up: NotNegative | None = None
    agree: Agreement | None = None


class Matrix(Section):
    name: Name
    about: str = ""
    sides: dict[Name, str]  # name -> command
    baseline: str | None = None  # the side to which the others are compared
    cases: Annotated[list[Case], Field(min_length=1)]
    repeats: Positive = 3
    warm_up: NotNegative = 0  # runs of every side that are not counted
    environment: dict[str, str] = {}  # set for every command
    prepare: list[str] = []  # commands that are run once, first
    timeout_s: Positive = 1800  # of one command
    quiet_wait_s: NotNegative = 0  # before each run, how long to wait for other work on the machine to pause

    @model_validator(mode="after")
    def check_names(self) -> "Matrix":
        used = [self.baseline] if self.baseline else []
        used += [side for case in self.cases for side in case.sides or []]
        for side in used:
            if side not in self.sides:
                raise ValueError(f"{side!r} is not among the sides: {', '.join(self.sides)}")
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            raise ValueError("cases: two cases have the same name")
        return self

    def sides_of(self, case: Case) -> list[str]:
        return case.sides if case.sides is not None else list(self.sides)


def load_matrix(path: str | Path, also: Iterable[str] = ()) -> Matrix:
    """Read and check a matrix, whose commands may have placeholders of `also`.

    Raises UserError that names the file and the key.
    """
    try:
        matrix = Matrix.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from None
    filler: dict[str, object] = dict.fromkeys((*also, *BUILT_IN), "x")
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
        section = Matrix
        if "agree" in first["loc"][:-1]:
            section = Agreement
        elif first["loc"][0] == "cases" and len(first["loc"]) == 3:
            section = Case
        return f"unknown key {key}, known here: {', '.join(section.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")


def fill_command(command: str, values: Mapping[str, object], where: str) -> list[str]:
    """The words of a command with every `{name}` replaced, also within a case's values.

    Braces around anything else are kept. Raises UserError, which begins with `where`.
    """

    def replace(match: re.Match) -> str:
        name = match[1]
        if name not in values:
            raise UserError(f"{where}: {{{name}}} is not defined, known here: {', '.join(values)}")
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
    """The values of the BUILT_IN placeholders for one run."""
    return {"python": sys.executable, "result": result or "", "work": work, "shared": shared, "repeat": repeat}
