"""The architecture holds: imports go down only, and what must stay light loads no torch."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.processes import ROOT, process_env

PACKAGE = ROOT / "ptune_dist"
# From the top. A module belongs to the longest entry that its name begins with; a layer imports itself and those below.
LAYERS = [
    ["api", "cli", "command_line", "cluster.__main__", "cluster.launch", "bench"],
    ["answering"],
    ["commands", "loop"],
    ["evaluation", "export", "cluster", "reports"],
    ["run", "cluster.node_check"],
    ["zero"],
    ["families"],
    ["model"],
    ["objectives", "optim"],
    ["prompts", "base", "data"],
    ["distributed"],
    [
        *("config", "metrics", "common", "errors", "nodes"),
        *("cluster.devices", "cluster.outcome", "cluster.processes", "cluster.rank_files", "cluster.torch_builds"),
        *("cluster.link", "cluster.secret"),  # nodes prove to each other what launchers prove
    ],
]
OUTSIDE = ("__init__", "__main__", "tiny")  # the version, the entry point, and the maker of the shipped bases
MAX_TOP_LEVEL_MODULES = 6
MAY_IMPORT_DEEPSPEED = ("zero", "bench")
# Read on login nodes and by the launcher, which must not wait for torch.
WITHOUT_TORCH = ("config", "metrics", "common", "errors", "nodes", "cluster", "reports")
WITH_TORCH = ("cluster.node_check",)  # it runs in the ranks


def module_name(path: Path) -> str:
    """Below the package: "train", "data.batches", "data" for a folder's __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
LAYERED = [name for name in MODULES if name.split(".")[0] not in OUTSIDE]


def is_within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def layer_of(name: str) -> int:
    """The layer's number from the top."""
    entries = [(entry, number) for number, layer in enumerate(LAYERS) for entry in layer if is_within(name, entry)]
    assert entries, f"{name} belongs to no layer"
    return max(entries, key=lambda found: len(found[0]))[1]


@cache
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
    """The modules of this package that a file imports."""
    below = {name.removeprefix("ptune_dist.") for name in imported_names(path) if name.startswith("ptune_dist.")}
    return below & set(MODULES)


def imports_outside(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


@pytest.mark.parametrize("name", LAYERED)
def test_imports_go_down_only(name):
    for other in ours(MODULES[name]) & set(LAYERED):
        assert layer_of(other) >= layer_of(name), f"{name} imports {other}, which is in a layer above it"


def test_the_maker_of_the_shipped_bases_needs_nothing_of_the_package():
    for name in (name for name in MODULES if name.startswith("tiny")):
        assert all(other.startswith("tiny") for other in ours(MODULES[name])), name


def test_no_two_modules_import_each_other_in_a_circle():
    TopologicalSorter({name: ours(MODULES[name]) - {name} for name in LAYERED}).prepare()  # or CycleError names one


def test_the_top_level_is_short():
    assert len([name for name in MODULES if (PACKAGE / f"{name}.py").exists()]) <= MAX_TOP_LEVEL_MODULES


def test_only_the_seam_imports_deepspeed():
    guilty = [
        name
        for name, path in MODULES.items()
        if "deepspeed" in imports_outside(path) and name.split(".")[0] not in MAY_IMPORT_DEEPSPEED
    ]
    assert not guilty
    assert "deepspeed" in imports_outside(MODULES["zero.engine"])  # the test sees an import where there is one


def light_modules() -> list[str]:
    return [
        name
        for name in MODULES
        if any(is_within(name, entry) for entry in WITHOUT_TORCH)
        and not any(is_within(name, entry) for entry in WITH_TORCH)
    ]


def test_importing_light_modules_loads_no_torch():
    assert len(light_modules()) >= 10
    script = f"""
import importlib, sys
for name in {light_modules()}:
    importlib.import_module(f"ptune_dist.{{name}}")
heavy = {{"torch", "transformers", "deepspeed", "datasets", "scipy", "sklearn", "sacrebleu"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], env=process_env(), check=True)
