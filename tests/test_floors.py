"""The house: imports go down only, and what must stay light loads no torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, process_env

PACKAGE = ROOT / "ptune_dist"
# As the design draws it. Every other module says its floor in its own docstring, or in that of its folder.
DESIGNED = {
    "config": 0, "topology": 0, "distributed": 1, "metrics": 1, "data": 2, "base": 2, "prompts": 2, "segments": 3,
    "engine": 4, "checkpoint": 5, "evaluate": 5, "generate": 5, "export": 5, "train": 6, "plan": 6, "bench": 6,
    "cli": 7,
    "tiny": 2,  # the maker of the shipped base, beside the house: it imports nothing of it
}  # fmt: skip
OUTSIDE = ("__init__", "__main__")  # the version and the door
WITHOUT_TORCH = ("config", "config_file", "deepspeed_json", "errors", "files", "hub", "sweep", "topology")
MAY_IMPORT_DEEPSPEED = ("engine", "distributed", "base", "bench")


def module_name(path: Path) -> str:
    """Below the package: "train", "data.batches", "data" for a folder's __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
HOUSE = [name for name in MODULES if name.split(".")[0] not in OUTSIDE]


def stated_floor(path: Path) -> int | None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = re.search(r"\bFloor (\d)\b", docstring)
    return int(found[1]) if found else None


def floor_of(name: str) -> int | None:
    """The design's word, else the module's own docstring's, else its folder's."""
    folder = name.split(".")[0]
    if folder in DESIGNED:
        return DESIGNED[folder]
    own = stated_floor(MODULES[name])
    return own if own is not None or folder == name else stated_floor(MODULES[folder])


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it: "torch.distributed", "ptune_dist.data.batches"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The modules of the house that a file imports."""
    below = {name.removeprefix("ptune_dist.") for name in imported_names(path) if name.startswith("ptune_dist.")}
    return below & set(MODULES)


def imports_outside(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


@pytest.mark.parametrize("name", HOUSE)
def test_every_module_has_a_floor_and_imports_go_down_only(name):
    floor = floor_of(name)
    assert floor is not None, f"{name}: no floor in its docstring"
    said = stated_floor(MODULES[name])
    assert said in (None, floor), f"{name}: its docstring says floor {said}, the design {floor}"
    for other in ours(MODULES[name]):
        assert floor_of(other) is not None, f"{name} imports {other}, which is no part of the house"
        assert floor_of(other) <= floor, f"{name} (floor {floor}) imports {other} (floor {floor_of(other)})"


def test_the_maker_of_the_shipped_base_needs_nothing_of_the_house():
    for name in (name for name in HOUSE if name.startswith("tiny")):
        assert all(other.startswith("tiny") for other in ours(MODULES[name])), name


def test_no_two_modules_import_each_other_in_a_circle():
    reached = {name: ours(MODULES[name]) - {name} for name in HOUSE}
    for _ in HOUSE:  # the transitive closure, a round for each module at most
        reached = {
            name: found.union(*(reached.get(other, set()) for other in found)) for name, found in reached.items()
        }
    circles = [name for name, found in reached.items() if name in found]
    assert not circles


def test_only_the_seam_imports_deepspeed():
    guilty = [
        name for name, path in MODULES.items()
        if "deepspeed" in imports_outside(path) and name.split(".")[0] not in MAY_IMPORT_DEEPSPEED
    ]  # fmt: skip
    assert not guilty
    assert "deepspeed" in imports_outside(MODULES["engine"])  # the test sees an import where there is one


def test_the_ground_floor_does_not_import_torch():
    for name in (name for name in HOUSE if floor_of(name) == 0):
        assert "torch" not in imports_outside(MODULES[name]), name
    assert "torch" in imports_outside(MODULES["engine"])


def test_importing_the_ground_floor_loads_no_torch():
    present = [name for name in WITHOUT_TORCH if name in MODULES]
    assert len(present) >= 5
    script = f"""
import importlib, sys
for name in {present}:
    importlib.import_module(f"ptune_dist.{{name}}")
heavy = {{"torch", "transformers", "deepspeed", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], env=process_env(), check=True)
