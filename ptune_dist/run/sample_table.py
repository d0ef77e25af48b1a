"""The table of answers to some held-out rows that a run prints at its end."""

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptune_dist.common.visible import show_controls

WIDTH_IN_LOGS = 120
LINES_OF_TEXT = 2
BORDERS = 3  # columns between two cells


def show_samples(samples: list[dict[str, str]]) -> None:
    """Print answers: a line for each row where they are short, else a block of at most two lines for each text."""
    if not samples:
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, WIDTH_IN_LOGS))
    cells = [{name: show_controls(text) for name, text in sample.items()} for sample in samples]
    console.print(build_table(cells, console.width))


def build_table(samples: list[dict[str, str]], width: int) -> Table:
    """A table of at most `width` characters."""
    names = list(samples[0])
    widest = [max(len(name), *(cell_len(sample[name]) for sample in samples)) for name in names]
    if sum(widest) + BORDERS * len(names) + 1 <= width:
        table = Table(*names)
        for sample in samples:
            table.add_row(*(Text(text) for text in sample.values()))
        return table
    table = Table(show_header=False)
    room = width - max(map(len, names)) - 2 * BORDERS - 1
    for sample in samples:
        for name, text in sample.items():
            table.add_row(
                name, Text(shorten(text, room * LINES_OF_TEXT), overflow="fold"), end_section=name == names[-1]
            )
    return table


def shorten(text: str, most: int) -> str:
    """The head and the tail of a long text, `most` wide on a terminal, where a Chinese character is 2 wide."""
    if cell_len(text) <= most:
        return text
    half = max(2, (most - 5) // 2 - most // 10)  # lines break between words, so some room is left
    head = set_cell_size(text[: half + 1], half).rstrip()
    tail = set_cell_size(text[-half - 1 :][::-1], half).rstrip()[::-1]
    return f"{head} ... {tail}"
