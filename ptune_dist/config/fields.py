"""The kinds of values that keys of the config have, and what all its sections are."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # YAML's yes and true are 1 to pydantic
        raise ValueError("a number is needed")
    return value


def refuse_text_but_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto" and not value.isdecimal():
        raise ValueError("a number or auto is needed")
    return value


def refuse_twice(labels: list[str]) -> list[str]:
    for number, label in enumerate(labels):
        if label in labels[:number]:
            raise ValueError(f"{label!r} is listed twice")
    return labels


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


Positive = Annotated[int, BeforeValidator(refuse_bool), Field(gt=0)]
NotNegative = Annotated[int, BeforeValidator(refuse_bool), Field(ge=0)]
Real = Annotated[float, BeforeValidator(refuse_bool), Field(allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, lt=1)]
# YAML reads a bare `off` as false.
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)]
Label = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value)]


class Section(BaseModel):
    """Part of the config: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
