"""All tables."""

from tests.private_names import of_deepspeed, of_others, of_transformers
from tests.private_names.rows import Row

TABLES = (of_deepspeed.TABLE, of_transformers.TABLE, of_others.TABLE)


def rows_of(file: str) -> list[Row]:
    return [row for table in TABLES for row in table.get(file, [])]


FILES = sorted({file for table in TABLES for file in table})  # of the package
