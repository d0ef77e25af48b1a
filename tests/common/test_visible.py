"""What a text holds can be seen where it is printed."""

import io

from rich.console import Console
from rich.text import Text

from ptune_dist.common.visible import show_controls


def test_every_line_break_and_control_character_is_seen():
    output = io.StringIO()
    Console(file=output, width=200).print(Text(show_controls("a\r\nb\rc\x0bd\x0ce\x07f\x1b[1mg\u2028hé")))
    assert output.getvalue() == "a\\r\\nb\\rc\\x0bd\\x0ce\\x07f\\x1b[1mg\\u2028hé\n"
