"""A tiny Llama, whole and to damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama(tiny_bases) -> Path:
    return tiny_bases["llama"]


@pytest.fixture
def base(llama, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "base"))
