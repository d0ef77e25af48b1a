"""Messages with binary parts on a stream: four bytes of length, a JSON object, then parts of the sizes it announces."""

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Parts = list[bytes]
MAX_HEADER_BYTES = 64 << 20
MAX_HELLO_BYTES = 1 << 16  # from who has not proved that it knows the secret
LENGTH_BYTES = 4


def encode(message: Message, parts: Sequence[bytes] = ()) -> Parts:
    header = json.dumps(message | {"sizes": [len(part) for part in parts]}).encode()
    return [len(header).to_bytes(LENGTH_BYTES, "big") + header, *parts]


class Decoder:
    """Cuts a stream into messages. Raises ValueError on what cannot be one."""

    def __init__(self) -> None:
        self.is_trusted = False  # parts and long headers are accepted
        self._data = bytearray()
        self._message: Message | None = None

    def feed(self, data: bytes) -> list[tuple[Message, Parts]]:
        self._data += data
        found = []
        while (complete := self._next()) is not None:
            found.append(complete)
            if not self.is_trusted:
                break  # the receiver may trust the sender now: the rest is taken with the next call
        return found

    def _next(self) -> tuple[Message, Parts] | None:
        if self._message is None:
            self._message = self._next_header()
        if self._message is None:
            return None
        sizes = self._message["sizes"]
        if len(self._data) < sum(sizes):
            return None
        message = self._message
        self._message = None
        parts = []
        start = 0
        for size in sizes:
            parts.append(bytes(self._data[start : start + size]))
            start += size
        del self._data[:start]
        return message, parts

    def _next_header(self) -> Message | None:
        if len(self._data) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._data[:LENGTH_BYTES], "big")
        if length > (MAX_HEADER_BYTES if self.is_trusted else MAX_HELLO_BYTES):
            raise ValueError("too long")
        end = LENGTH_BYTES + length
        if len(self._data) < end:
            return None
        message = json.loads(self._data[LENGTH_BYTES:end])
        del self._data[:end]
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise ValueError("not a message")
        sizes = message.get("sizes")
        if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("no sizes")
        if sizes and not self.is_trusted:
            raise ValueError("parts before the proof")
        return message
