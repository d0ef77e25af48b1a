"""Text of another encoding as UTF-8, and what shows that the encoding is a wrong one.

Nearly every byte is a character in latin-1 or cp1252, so a file that is in fact UTF-8 is read without an error, and
"café" becomes "cafÃ©". Text of another encoding is hardly ever valid UTF-8, which tells the two apart.
"""

import codecs
import re
import tempfile
from collections.abc import Iterator
from typing import IO

from ptune_dist.errors import UserError

_CHUNK = 1 << 20
# Encodings in which bytes from 0x80 to 0xBF are signs and rarely letters: one line of UTF-8 among others is found too.
_WESTERN = ("iso8859-1", "iso8859-15", "cp1252")
# What ISO's encodings lack: their bytes from 0x80 to 0x9F are control characters, which no text has.
_OF_WINDOWS = {
    **dict.fromkeys(("iso8859-1", "iso8859-15"), "cp1252"),
    **{"iso8859-2": "cp1250", "iso8859-5": "cp1251", "iso8859-7": "cp1253", "iso8859-9": "cp1254"},
    **{"iso8859-8": "cp1255", "iso8859-6": "cp1256", "iso8859-13": "cp1257"},
}
_CONTROLS = re.compile(rb"[\x80-\x9f]")
# Characters that an accident hardly makes: of latin-1, of three bytes and more, or two in a row.
_TYPICAL = re.compile("[\u00a0-\u00ff\u0800-\U0010ffff]|[\u0100-\u07ff]{2}")
_FEW = 3


def check_encoding(plain: IO[bytes], encoding: str, name: str) -> None:
    """Raise UserError where a file is UTF-8 text, wholly or in part, or is read with control characters."""
    kind = codecs.lookup(encoding).name
    if kind.startswith("utf-8"):
        return
    if kind.startswith(("utf-16", "utf-32")):
        if is_utf8_head(plain):
            raise UserError(f"{name}: the file is UTF-8 text and not {encoding}: leave data.csv.encoding out")
        return
    first = None  # the first line that is UTF-8 text, and the number of the first one that is not
    other = None
    num_characters = 0
    for number, line in odd_lines(plain):
        text = read_utf8(line)
        if text is None:
            other = other or number
            refuse_controls(line, number, encoding, name)
        else:
            num_characters += sum(not character.isascii() for character in text)
            if first is None and _TYPICAL.search(text):
                first = (number, line)
        if other and (first if kind in _WESTERN else kind not in _OF_WINDOWS):
            break
    if first is None or (kind not in _WESTERN and (other or num_characters < _FEW)):
        return
    number, line = first
    reads = f"{encoding} (data.csv.encoding) reads it as {excerpt(line, encoding)!r}"
    if other:
        raise UserError(
            f"{name} line {number} is UTF-8 text and line {other} is not: {reads}; save the whole file as UTF-8"
        )
    raise UserError(f"{name} line {number}: {reads}, but the file is UTF-8 text: leave data.csv.encoding out")


def refuse_controls(line: bytes, number: int, encoding: str, name: str) -> None:
    """Raise UserError for a control character that is a letter or a sign in the encoding that Windows has instead."""
    control = _CONTROLS.search(line)
    windows = _OF_WINDOWS.get(codecs.lookup(encoding).name)
    if control is None or windows is None:
        return
    meant = control[0].decode(windows, "ignore")
    hint = f"which is {meant!r} in {windows}: set data.csv.encoding={windows}" if meant else "which no text has"
    reads = f"the byte {control[0].hex()} is a control character in {encoding} (data.csv.encoding)"
    raise UserError(f"{name} line {number}: {reads}, {hint}")


def odd_lines(plain: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of the lines that are not ASCII."""
    plain.seek(0)
    for number, line in enumerate(plain, 1):
        if not line.isascii():
            yield number, line


def read_utf8(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def is_utf8_head(plain: IO[bytes]) -> bool:
    """Whether a file begins as UTF-8 text does; text in UTF-16 and UTF-32 has zeros, at the ends of lines at least."""
    plain.seek(0)
    head = plain.read(_CHUNK)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head.strip()) and b"\0" not in head


def excerpt(line: bytes, encoding: str) -> str:
    """The part of a line around its first character that is not ASCII, as this encoding reads it."""
    at = next(index for index, byte in enumerate(line) if byte > 0x7F)
    return line[max(at - 12, 0) : at + 12].decode(encoding, "replace").strip()


def recode(plain: IO[bytes], encoding: str, name: str) -> IO[bytes]:
    """A temporary file with the same text in UTF-8. Raises UserError with the line that is not in this encoding."""
    check_encoding(plain, encoding, name)
    target = tempfile.TemporaryFile()
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    plain.seek(0)
    while True:
        chunk = plain.read(_CHUNK)
        _, state = decoder.getstate()  # the order of bytes, say
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeError as error:
            if isinstance(error, UnicodeDecodeError):
                decoder.setstate((b"", state))
                line += decoder.decode(error.object[: error.start]).count("\n")
            raise UserError(f"{name} line {line}: these bytes are not {encoding} text (data.csv.encoding)") from None
        line += text.count("\n")
        target.write(text.encode("utf-8", "surrogatepass"))
        if not chunk:
            break
    target.flush()
    return target
