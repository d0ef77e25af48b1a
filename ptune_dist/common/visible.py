"""Texts as one line on a terminal."""

# Rich drops some control characters, and a terminal obeys others: a reader would not see what the text holds.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\t", "\u2028": "\\u2028", "\u2029": "\\u2029"}
ESCAPES = _CONTROLS | str.maketrans(_NAMED)


def show_controls(text: str) -> str:
    """A text with its line breaks and control characters, except tabs, as a YAML text in double quotes writes them."""
    return text.translate(ESCAPES)
