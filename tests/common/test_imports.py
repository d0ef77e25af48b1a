"""What makes a command start fast."""

import ast
import gc
from pathlib import Path

import ptune_dist
from ptune_dist.common.imports import without_garbage_collection

PACKAGE = Path(ptune_dist.__file__).parent
SLOW = {"datasets", "pandas", "scipy", "pyarrow"}  # half a second, and most commands use none of it
MAY_IMPORT = {"data/stored_tables.py", "data/arrow_values.py"}  # imported where a source needs them


def imported_at_the_top(file: Path) -> set[str]:
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_slow_packages_are_imported_only_where_they_are_used():
    files = {file.relative_to(PACKAGE).as_posix(): file for file in PACKAGE.rglob("*.py")}
    own = {name for name, file in files.items() if not name.startswith("bench/") and imported_at_the_top(file) & SLOW}
    assert own == MAY_IMPORT
    modules = {f"ptune_dist.{name.removesuffix('.py').replace('/', '.')}" for name in MAY_IMPORT}
    for name, file in files.items():
        top = {node.module for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom)}
        assert name in MAY_IMPORT or not top & modules, name


def test_later_collections_skip_what_was_imported():
    gc.unfreeze()
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 1000
    gc.unfreeze()
