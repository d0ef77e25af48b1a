"""What a row of the tables is, and one function for each way in which a name can be checked.

`target` is "module" or "module:object.attribute". `why` completes "ptune_dist/FILE needs it to ...".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A name in another library; `used_as` is text that our file contains as long as it uses the name."""

    kind: str  # the name of the function below that made it
    target: str
    name: str
    why: str
    used_as: str

    @property
    def library(self) -> str:
        """The top-level module."""
        return self.target.partition(":")[0].partition(".")[0]


Table = dict[str, list[Row]]  # by file, relative to the package


def attribute(target: str, why: str, used_as: str = "") -> Row:
    """What `target` names exists: a class, a function, an attribute."""
    module, _, path = target.partition(":")
    outer, _, name = path.rpartition(".")
    return Row("attribute", f"{module}:{outer}" if outer else module, name, why, used_as or name)


def parameter(target: str, name: str, why: str, used_as: str = "") -> Row:
    """A function, or a class when it is called, takes a parameter of that name."""
    return Row("parameter", target, name, why, used_as or name)


def instance(target: str, name: str, why: str) -> Row:
    """A class sets the attribute on its instances."""
    return Row("instance", target, name, why, name)


def source(target: str, text: str, why: str, used_as: str) -> Row:
    """The source of a function, class or module contains the text: for what cannot be checked in a better way."""
    return Row("source", target, text, why, used_as)


def sets_exactly(target: str, names: str, why: str, used_as: str) -> Row:
    """A function sets these attributes of objects and no others: a new one would be missing in our copy of it."""
    return Row("sets_exactly", target, names, why, used_as)


def file(target: str, path: str, why: str) -> Row:
    """A function or class is defined in a file whose path contains the text."""
    return Row("file", target, path, why, path)


def binary(target: str, text: str, why: str) -> Row:
    """A compiled library contains the text. `target` is "torch:cpu", or "torch:cuda" for builds with CUDA."""
    return Row("binary", target, text, why, text)
