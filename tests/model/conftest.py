"""A stored context."""

from pathlib import Path

import pytest

from tests.model.cached import build_cache, stored_files, tensors_of, tokens_of


@pytest.fixture
def stored(tmp_path) -> Path:
    """The file of context 0 in `tmp_path`."""
    build_cache(tmp_path).put(tokens_of(0), tensors_of(0))
    (file,) = stored_files(tmp_path)
    return file
