"""The code whose tests are tested, and which tests are to find a fault in it, the quickest first."""

from typing import NamedTuple


class Area(NamedTuple):
    """Paths from the repository's root; a path that ends in / stands for the files in the folder."""

    code: tuple[str, ...]
    tests: tuple[str, ...]


AREAS = {
    "files": Area(("ptune_dist/common/files.py",), ("tests/common", "tests/durability")),
    "checkpoint": Area(
        ("ptune_dist/run/checkpoint.py",), ("tests/run/test_checkpoint.py", "tests/durability/test_durability.py")
    ),
    "metrics": Area(("ptune_dist/metrics/",), ("tests/metrics",)),
    "optimizer": Area(("ptune_dist/optim/",), ("tests/optim", "tests/numerics/test_curves.py")),
    "head": Area(("ptune_dist/model/head.py", "ptune_dist/model/from_head.py"), ("tests/numerics/test_head.py",)),
    "layout": Area(
        ("ptune_dist/model/layout.py", "ptune_dist/model/packing.py"),
        ("tests/numerics/test_segments.py", "tests/numerics/test_labels.py", "tests/numerics/test_placements.py"),
    ),
    "attention": Area(
        (
            "ptune_dist/model/attention.py",
            "ptune_dist/model/attention_contexts.py",
            "ptune_dist/model/attention_products.py",
            "ptune_dist/model/attention_trees.py",
        ),
        ("tests/numerics/test_attention.py", "tests/numerics/test_segments.py", "tests/numerics/test_labels.py"),
    ),
    "resume": Area(
        ("ptune_dist/run/folder.py", "ptune_dist/run/progress.py"),
        ("tests/run/test_folder.py", "tests/test_train.py", "tests/numerics/test_resume.py"),
    ),
}
