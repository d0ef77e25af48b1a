"""A tiny Llama to damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def base(llama, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "base"))
