"""Rows of a file."""

import pytest

from ptune_dist.data.sources import Rows, load_rows


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows: tuple, name="a.csv") -> Rows:
        path = tmp_path / name
        path.write_text("text,label\n" + "".join(f'"{text}","{label}"\n' for text, label in rows))
        return load_rows(str(path), key="data.train", default_split="train")

    return write_rows
