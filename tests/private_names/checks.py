"""Check rows of the tables against the installed releases."""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import mmap
import os
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.private_names.rows import Row

# DeepSpeed picks its accelerator when it is imported; without a GPU it must not look for one.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


class Missing(Exception):
    """What an installed release lacks; the message completes "deepspeed 0.20.0 has ..."."""


def complaint_about(file: str, row: Row) -> str | None:
    """What is wrong with a name that a file of ours needs; None where the installed release has it."""
    try:
        CHECKS[row.kind](row)
    except Missing as missing:
        release = f"{row.library} {importlib.metadata.version(row.library)}"
        return f"{release} has {missing}; ptune_dist/{file} needs it to {row.why}"
    return None


def check_attribute(row: Row) -> None:
    if not hasattr(find(row.target), row.name):
        raise Missing(f"no {row.name} in {row.target}")


def check_parameter(row: Row) -> None:
    if row.name not in inspect.signature(find(row.target)).parameters:
        raise Missing(f"no parameter {row.name} of {row.target}")


def check_instance(row: Row) -> None:
    """The class, or one that it inherits from, assigns the attribute or declares it."""
    for each in inspect.getmro(find(row.target)):
        if each.__module__ == "builtins":
            continue
        code = code_of_object(each)
        declared = vars(each).get("__annotations__", {})
        if row.name in declared or row.name in assigned_names(code, of="self"):
            return
    raise Missing(f"no attribute {row.name} of instances of {row.target}")


def check_source(row: Row) -> None:
    if squeeze(row.name) not in squeeze(code_of(row.target)):
        raise Missing(f"no {row.name!r} in the source of {row.target}")


def check_sets_exactly(row: Row) -> None:
    differing = assigned_names(code_of(row.target)) ^ set(row.name.split())
    if differing:
        raise Missing(f"other attributes that {row.target} sets: {', '.join(sorted(differing))} differ")


def check_file(row: Row) -> None:
    path = inspect.getsourcefile(inspect.unwrap(find(row.target)))
    if path is None or row.name not in path:
        raise Missing(f"no {row.name} in the path of {row.target}, which is {path}")


def check_binary(row: Row) -> None:
    kind = row.target.partition(":")[2]
    if kind == "cuda" and torch.version.cuda is None:
        return
    if not any(content.find(row.name.encode()) >= 0 for content in compiled_libraries(kind)):
        raise Missing(f"no text {row.name!r} in its compiled libraries")


CHECKS = {
    "attribute": check_attribute,
    "parameter": check_parameter,
    "instance": check_instance,
    "source": check_source,
    "sets_exactly": check_sets_exactly,
    "file": check_file,
    "binary": check_binary,
}


def find(target: str) -> Any:
    """The object that a row's target names. Raises Missing."""
    module, _, path = target.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"no module {module} ({error})") from None
    parts = path.split(".") if path else []
    for number, name in enumerate(parts):
        if not hasattr(found, name):
            raise Missing(f"no {module}.{'.'.join(parts[: number + 1])}")
        found = getattr(found, name)
    return found


@functools.cache
def code_of(target: str) -> str:
    """The Python source of what `target` names; of a decorated function its own. Raises Missing."""
    found = find(target)
    if isinstance(found, (ModuleType, type)):
        return code_of_object(found)
    module, _, path = target.partition(":")
    outer, _, name = path.rpartition(".")
    code = code_of_object(find(f"{module}:{outer}"))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return textwrap.dedent(ast.get_source_segment(code, node, padded=True) or "")
    return code_of_object(inspect.unwrap(found))  # it is imported there from elsewhere


@functools.cache
def code_of_object(found: Any) -> str:
    return textwrap.dedent(inspect.getsource(found))


@functools.cache
def assigned_names(code: str, of: str | None = None) -> frozenset[str]:
    """Attributes that the code assigns, of any object or of the variable `of`."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if of is None or (isinstance(node.value, ast.Name) and node.value.id == of):
                names.add(node.attr)
    return frozenset(names)


def squeeze(code: str) -> str:
    """Code without white space and with one kind of quotes, so that another formatting changes nothing."""
    return "".join(code.split()).replace("'", '"')


@functools.cache
def compiled_libraries(kind: str) -> list[mmap.mmap]:
    """torch's own shared libraries: "cpu", or "cuda" with NCCL's."""
    own = Path(torch.__file__).parent / "lib"
    files = [own / "libtorch_cpu.so"]
    if kind == "cuda":
        files = [*own.glob("libtorch_cuda*.so"), *own.parent.parent.glob("nvidia/nccl/lib/libnccl.so*")]
    return [mmap.mmap(os.open(file, os.O_RDONLY), 0, access=mmap.ACCESS_READ) for file in files]
