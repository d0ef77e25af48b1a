"""The kinds of values that keys of the config have, and what all its sections are."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # YAML's yes and true are 1 to pydantic
        raise ValueError("a number is needed")
    return value


def at_most(most: int) -> AfterValidator:
    """Refuses larger numbers, which no machine could compute with."""

    def check(value: Any) -> Any:
        if isinstance(value, int) and value > most:
            raise ValueError(f"at most {most:,} is possible")
        return value

    return AfterValidator(check)


def read_off(value: Any) -> Any:
    """A folder that can be turned off: `off` and its like are None, and `on` is refused."""
    if not isinstance(value, (str, bool)):
        return value
    word = str(value).lower()
    if word in ("on", "true", "yes", "1"):
        raise ValueError("a folder is needed, or off")
    return None if word in ("", "off", "false", "no", "none", "0") else value


def refuse_placeholder(value: Any) -> Any:
    """Refuse `${...}` and `$NAME` in a path, which nothing fills in here."""
    found = PLACEHOLDER.search(value) if isinstance(value, str) else None
    if found and not os.path.exists(value):
        raise ValueError(f"{found[0]} is not filled in here: write the path itself, or give it on the command line")
    return value


def refuse_text_but_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto" and not value.isdecimal():
        raise ValueError("a number or auto is needed")
    return value


def refuse_twice(names: list[str]) -> list[str]:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{name!r} is listed twice")
    return names


def read_header(value: Any) -> Any:
    """`data.csv.header`: a list of names, or what YAML takes for true or false; the values are texts as written."""
    if isinstance(value, list) and value:
        names = [str(name) if isinstance(name, (int, float)) and not isinstance(name, bool) else name for name in value]
        if all(isinstance(name, str) for name in names):
            return names
    if isinstance(value, str) and value.lower() in ("true", "yes", "on"):
        return True
    if value is None or value is True:
        return value
    raise ValueError("name the columns in a list, such as [id, text], or leave it out")


def read_held_out(value: Any) -> Any:
    """`data.validation`: files, or how many of the training rows, as a number or a share."""
    if isinstance(value, str) and NUMBER.fullmatch(value) and not os.path.exists(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if not (0 < value < 1 or value >= 1 and value == int(min(value, MOST))):
        raise ValueError("a file, a number of the training rows, or a share of them such as 0.1 is needed")
    return int(value) if value >= 1 else value


def refuse_empty(values: Any) -> Any:
    if values == []:
        raise ValueError("a path or a name is needed, and the list is empty")
    return values


def read_interval(value: Any) -> Any:
    """An interval between events: whole steps, a share of all steps, or `epoch`."""
    if isinstance(value, bool):  # YAML's yes and true are 1
        raise ValueError("a number of steps, a share such as 0.1, or epoch is needed")
    if isinstance(value, str):
        try:
            value = float(value) if value != EPOCH else value
        except ValueError:
            raise ValueError("a number of steps, a share such as 0.1, or epoch is needed") from None
    if value == EPOCH or not isinstance(value, (int, float)):
        return value
    if not (value >= 0 and (value < 1 or value == int(min(value, MOST)))):
        raise ValueError("a number of steps, at least 0, or a share of all steps below 1 is needed")
    return int(value) if value == int(value) else value


EPOCH = "epoch"
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
MOST = 2**32
# Not ${{...}}, which Azure fills in before a command runs.
PLACEHOLDER = re.compile(r"\$\{(?!\{)[^}]*\}?|\$\w+|\$\(.*\)?")
PathText = Annotated[str, AfterValidator(refuse_placeholder)]
Sources = Annotated[PathText | list[PathText], AfterValidator(refuse_empty)]
Positive = Annotated[int, BeforeValidator(refuse_bool), Field(gt=0), at_most(MOST)]
NotNegative = Annotated[int, BeforeValidator(refuse_bool), Field(ge=0), at_most(MOST)]
Real = Annotated[float, BeforeValidator(refuse_bool), Field(allow_inf_nan=False)]
Interval = Annotated[int | float | Literal["epoch"], BeforeValidator(read_interval)]
Share = Annotated[Real, Field(ge=0, lt=1)]
# YAML reads a bare `off` as false.
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
OptionalFolder = Annotated[PathText | None, BeforeValidator(read_off)]
Label = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value)]


class Section(BaseModel):
    """Part of the config: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
