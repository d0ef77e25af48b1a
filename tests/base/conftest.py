"""A tiny Llama, whole and to damage; a stored context."""

import shutil
from pathlib import Path

import pytest

from tests.model.cached import build_cache, stored_files, tensors_of, tokens_of


@pytest.fixture(scope="session")
def llama(tiny_bases) -> Path:
    return tiny_bases["llama"]


@pytest.fixture
def base(llama, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "base"))


@pytest.fixture
def stored(tmp_path) -> Path:
    """The file of context 0 in `tmp_path`."""
    build_cache(tmp_path).put(tokens_of(0), tensors_of(0))
    (file,) = stored_files(tmp_path)
    return file
