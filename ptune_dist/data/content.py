"""The bytes of a text file as UTF-8, read at any offset: decompressed, and recoded where an encoding is given.

A plain UTF-8 file is read where it lies. Others are written once to a temporary file without a name (in TMPDIR), which
is gone when its last reader is. Forked processes share it; an unpickled Content makes its own.
"""

import bz2
import codecs
import gzip
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ptune_dist.common.files import COMPRESSED_SUFFIXES, text_suffix
from ptune_dist.common.progress_line import REPORT_S, ProgressLine, is_first_here
from ptune_dist.data.recoding import recode
from ptune_dist.errors import UserError

# How files begin that are sometimes named as text.
KINDS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".parquet": re.compile(rb"PAR1"),
    ".zip (or a spreadsheet)": re.compile(rb"PK\x03\x04"),
    ".arrow": re.compile(rb"ARROW1\0"),
}
HEAD_BYTES = 64
_CHUNK = 1 << 20
_UTF8_MARK = codecs.BOM_UTF8
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Content:
    """One file; `name` is what errors call it. Raises UserError where the file cannot be read or decompressed."""

    def __init__(self, path: Path, name: str, encoding: str | None = None):
        self.path = path.absolute()
        self.name = name
        self.encoding = encoding
        self._file: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    @property
    def suffix(self) -> str:
        """The extension of the text, without that of the compression."""
        return text_suffix(self.path)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`; fewer where the file ends earlier."""
        number = self._open().fileno()
        parts = []
        while start < end:
            part = os.pread(number, end - start, start)
            if not part:
                break
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def size(self) -> int:
        return os.fstat(self._open().fileno()).st_size

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, line with its line break); lines end at \\n alone. A UTF-8 byte order mark is skipped."""
        with open(os.dup(self._open().fileno()), "rb", buffering=_CHUNK) as file:
            file.seek(self.start())
            offset = self.start()
            progress = ProgressLine(f"reading {self.name} (bytes)", self.size(), is_first_here(), between_s=REPORT_S)
            counted = 0
            for line in file:
                yield offset, line
                offset += len(line)
                if offset - counted >= _CHUNK:
                    progress.count(offset - counted)
                    counted = offset

    def start(self) -> int:
        """The offset of the text: after the byte order mark, if there is one."""
        return len(_UTF8_MARK) if self.read(0, len(_UTF8_MARK)) == _UTF8_MARK else 0

    def line_at(self, offset: int) -> int | None:
        """The number, from 1, of the line that holds this offset; None where the file has become shorter."""
        if self.size() <= offset:
            return None
        starts = range(0, offset, _CHUNK)
        return 1 + sum(self.read(start, min(offset, start + _CHUNK)).count(b"\n") for start in starts)

    def _open(self) -> IO[bytes]:
        if self._file is None:
            try:
                self._file = self._prepare()
            except OSError as error:
                raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from None
        return self._file

    def _prepare(self) -> IO[bytes]:
        plain = open_decompressed(self.path, self.name)
        head = os.pread(plain.fileno(), HEAD_BYTES, 0)
        refuse_binary(head, self.path, self.name)
        if self.encoding is None:
            if head.startswith(_WIDE_MARKS):
                raise UserError(f"{self.name}: the file is UTF-16 text; save it as UTF-8{self.encoding_hint()}")
            return plain
        with plain:
            return recode(plain, self.encoding, self.name)

    def encoding_hint(self) -> str:
        return ", or give data.csv.encoding" if self.suffix in (".csv", ".tsv") else ""


def open_decompressed(path: Path, name: str) -> IO[bytes]:
    """The file itself, or a temporary one with what it contains. Raises UserError for a damaged archive."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED_SUFFIXES:
        return open(path, "rb")
    target = tempfile.TemporaryFile()
    with open(path, "rb") as packed:
        try:
            if suffix == ".zst":
                unpack_zst(packed, target, name)
            else:
                opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
                with opener(packed, "rb") as unpacked:
                    shutil.copyfileobj(unpacked, target, _CHUNK)
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError) as error:
            raise damaged(path, name, error) from None
        except OSError as error:
            if error.errno is None:  # how bz2 reports damage
                raise damaged(path, name, error) from None
            raise
    target.flush()
    return target


def damaged(path: Path, name: str, error: Exception) -> UserError:
    """What is wrong with a compressed file: it is of another kind than its name says, or broken."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    kind = find_kind(head)
    if kind not in (None, suffix):
        return UserError(f"{name}: the content is {kind} and not {suffix}: name it by what it is")
    if kind is None and looks_like_text(head):
        return UserError(f"{name}: the content is plain text and not {suffix}: rename it without {suffix}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{name}: the {suffix} file is damaged or cut short ({reason})")


def find_kind(head: bytes) -> str | None:
    """The extension of what begins with these bytes, if it is one of KINDS."""
    return next((kind for kind, pattern in KINDS.items() if pattern.match(head)), None)


def looks_like_text(head: bytes) -> bool:
    """Whether these first bytes of a file are UTF-8 text; they may end within a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(head.strip()) and min(head) >= ord("\t")


def refuse_binary(head: bytes, path: Path, name: str) -> None:
    """Raise UserError where what should be text begins as a file of another kind does."""
    kind = find_kind(head)
    if kind is None:
        return
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        raise UserError(f"{name}: what the file holds is {kind} again, and not text: unpack it first")
    if kind in COMPRESSED_SUFFIXES:
        raise UserError(f"{name}: the content is {kind}, which its name does not say: rename it to {path.name}{kind}")
    hint = "rename it to .parquet" if kind == ".parquet" else "save its rows as .jsonl, .csv or .parquet"
    raise UserError(f"{name}: the content is {kind} and not text: {hint}")


def unpack_zst(packed: IO[bytes], target: IO[bytes], name: str) -> None:
    """Decompress all frames of a .zst file. Raises ValueError where it is damaged or its last frame has no end."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{name}: reading .zst files needs the package zstandard: pip install zstandard") from None
    unpacker = None
    try:
        while chunk := packed.read(_CHUNK):
            while chunk:
                if unpacker is None:
                    unpacker = zstandard.ZstdDecompressor().decompressobj()
                target.write(unpacker.decompress(chunk))
                chunk = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    except zstandard.ZstdError as error:
        raise ValueError(error) from None
    if unpacker is not None or not target.tell() and not os.fstat(packed.fileno()).st_size:
        raise ValueError("the end is missing")
