"""The names of other libraries that the package leans on without a promise (tests/private_names) are all there.

And they stay where they belong: DeepSpeed's private names in zero/, those of transformers in model/ and base/.
"""

import ast
import importlib.metadata
import re
import tomllib

import pytest

from tests.private_names.checks import assigned_names, complaint_about
from tests.private_names.rows import attribute, parameter, sets_exactly, source
from tests.private_names.tables import FILES, rows_of
from tests.processes import ROOT

PACKAGE = ROOT / "ptune_dist"
# Where private names of each library may be used; torch's are the dictionaries of nn.Module, and functions in stacks.
FOLDERS = {
    "deepspeed": ("zero/",),
    "transformers": ("model/", "base/"),
    "torch": ("model/", "base/", "cluster/stacks.py"),
}
PUBLIC = {
    "common/interrupts.py": {"_exit"},
    "run/watch.py": {"_exit"},
    "cluster/processes.py": {"_exit"},
}  # documented names that begin with an underscore
UNDOCUMENTED = ("deepspeed.", "transformers.")  # what is imported from their submodules needs a row


@pytest.mark.parametrize("file", FILES)
def test_the_installed_releases_have_every_name(file):
    complaints = [complaint for row in rows_of(file) if (complaint := complaint_about(file, row))]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (attribute("torch.nn:Module._gone", "x"), "no _gone in torch.nn:Module"),
        (attribute("torch.nn:Gone._gone", "x"), "no torch.nn.Gone"),
        (attribute("torch.gone:Module", "x"), "no module torch.gone (No module named 'torch.gone')"),
        (parameter("torch.nn:Linear", "gone", "x"), "no parameter gone of torch.nn:Linear"),
        (source("torch.nn:Linear", "gone()", "x", ""), "no 'gone()' in the source of torch.nn:Linear"),
        (
            sets_exactly("torch.nn:Linear.__init__", "in_features out_features weight gone", "x", ""),
            "other attributes that torch.nn:Linear.__init__ sets: bias, gone differ",
        ),
    ],
)
def test_a_missing_name_is_reported_with_its_release_and_its_use(row, complaint):
    release = f"torch {importlib.metadata.version('torch')}"
    assert complaint_about("model/head.py", row) == f"{release} has {complaint}; ptune_dist/model/head.py needs it to x"


@pytest.mark.parametrize("file", FILES)
def test_the_file_still_uses_every_name(file):
    path = PACKAGE / file
    assert path.is_file(), f"ptune_dist/{file} is gone: move its group in tests/private_names, or remove it"
    text = path.read_text()
    stale = [row.used_as for row in rows_of(file) if row.used_as not in text]
    assert not stale, f"ptune_dist/{file} does not use {stale} anymore: remove the rows from tests/private_names"


# Private names that the tables lack

TREES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names_used(tree: ast.Module) -> set[str]:
    """Private names that a module takes from others: imports, attributes of anything but self and cls, getattr."""
    names: set[object] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.keyword):
            names.add(node.arg)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return {str(name) for name in names if is_private(name)}


def own_private_names(tree: ast.Module) -> set[str]:
    """Those that a module defines itself: a class may use them of another instance of its own."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return defined | assigned_names(ast.unparse(tree), of="self")


def test_every_private_name_is_in_a_table():
    for file, tree in TREES.items():
        listed = {name for row in rows_of(file) for name in (row.name, row.used_as)}
        unlisted = private_names_used(tree) - own_private_names(tree) - listed - PUBLIC.get(file, set())
        assert not unlisted, f"ptune_dist/{file} uses {sorted(unlisted)}: add rows to tests/private_names"


def test_private_names_of_a_library_are_used_in_its_folders_only():
    for file in FILES:
        for row in rows_of(file):
            if is_private(row.name) and row.library in FOLDERS:
                assert file.startswith(FOLDERS[row.library]), f"ptune_dist/{file} uses {row.library}'s {row.name}"


def test_every_import_from_a_submodule_of_deepspeed_or_transformers_is_in_a_table():
    for file, tree in TREES.items():
        listed = {row.used_as for row in rows_of(file)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(UNDOCUMENTED):
                unlisted = {alias.name for alias in node.names} - listed
                assert not unlisted, f"ptune_dist/{file} imports {sorted(unlisted)} from {node.module}: add rows"


def test_the_scan_sees_private_names():
    code = "from a import _b\nx._c = x._d()\nself._e\ngetattr(x, f'_f_{y}')\nx.__class__\nf(_g=1)"
    assert private_names_used(ast.parse(code)) == {"_b", "_c", "_d", "_f_", "_g"}


def test_pyproject_caps_each_library_at_the_next_minor_release_after_the_tested_one():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tested = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE))
    for library in ("torch", "deepspeed", "transformers"):
        major, minor = map(int, tested[library].split("."))
        (wish,) = [line for line in wanted if re.match(rf"{library}\W", line)]
        assert wish.endswith(f",<{major}.{minor + 1}"), f"{wish}: CI tests {library} {tested[library]}"
