"""Where nodes find each other, and what lets only one view follow another: a folder that all share."""

import asyncio
import contextlib
import errno
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from ptune_dist.common.files import explain, flush, write_durably
from ptune_dist.errors import UserError
from ptune_dist.nodes.dial import Notices
from ptune_dist.nodes.turns import ViewRecord

VIEW = re.compile(r"view-(\d{8,})\.json")
ALIVE = "alive"
NUM_KEPT = 16
READ_S = 5.0  # a file that was just made may not be seen at once on a network disk, or be half written
PAUSE_S = 0.1
RETRY_S = 1.0
T = TypeVar("T")
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


class Rendezvous(Protocol):
    async def start(self) -> None: ...

    async def claim(self, view: ViewRecord, is_majority: bool) -> ViewRecord:
        """The view that holds the number, or a newer one: `view` if this claim was first, or an equal one was."""
        ...

    async def latest(self) -> ViewRecord | None:
        """The newest view; None if there has not been one."""
        ...

    async def announce(self, view: ViewRecord) -> ViewRecord:
        """Called every second by the members of a view. Returns the newest one: they may have been left behind."""
        ...

    async def sign_of_life(self) -> str:
        """A text that changes while members announce."""
        ...

    async def may_found(self) -> bool:
        """Whether `latest` has said None because there has been no view, not because this is not known yet."""
        ...

    async def close(self) -> None: ...


class FolderRendezvous:
    """One file for each view. A file is made whole and then linked to its name, which only the first can do.

    Old views are removed. Who comes late to one of their numbers hears of the newest view all the same.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _: None):
        self._folder = folder
        self._notices = Notices(say)

    async def start(self) -> None:
        try:
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder}: {explain(error, self._folder)}") from None

    async def close(self) -> None:
        pass

    async def may_found(self) -> bool:
        return True

    async def claim(self, view: ViewRecord, is_majority: bool) -> ViewRecord:
        return await self._insist(lambda: self._claim(view))

    async def latest(self) -> ViewRecord | None:
        return await self._insist(self._read_newest)

    async def _insist(self, call: Callable[[], T]) -> T:
        """What a call returns, once the disk is there: a change of view waits for it."""
        while True:
            try:
                return await asyncio.to_thread(call)
            except OSError as error:
                self._notices.tell(f"the nodes' folder {self._folder}: {explain(error)}: tries again")
            await asyncio.sleep(RETRY_S)

    def _claim(self, view: ViewRecord) -> ViewRecord:
        if self._newest_number() <= view.number:
            path = self._path(view.number)
            data = json.dumps(view.to_json(), sort_keys=True).encode()
            temporary = self._folder / f".{path.name}-{secrets.token_hex(8)}"
            try:
                write_durably(temporary, data)
                self._link(temporary, path, data)
            except FileExistsError:
                pass
            else:
                self._remove_before(view.number - NUM_KEPT + 1)
            finally:
                temporary.unlink(missing_ok=True)
        held = self._read_newest(view.number)  # whoever comes late to an old number hears of the newest view
        assert held, "there is one at least"
        return held

    def _link(self, temporary: Path, path: Path, data: bytes) -> None:
        """Raises FileExistsError where another node was first."""
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                flush(file.fileno())

    def _remove_before(self, number: int) -> None:
        for name in os.listdir(self._folder):
            if (found := re.match(r"\.?view-(\d+)\.json", name)) and int(found[1]) < number:
                with contextlib.suppress(OSError):
                    (self._folder / name).unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"view-{number:08d}.json"

    def _newest_number(self) -> int:
        return max((int(found[1]) for found in map(VIEW.fullmatch, os.listdir(self._folder)) if found), default=0)

    def _read_newest(self, at_least: int = 0) -> ViewRecord | None:
        """The newest view, whose number is `at_least` this even where a network disk does not list it yet.

        Raises OSError where the disk is away, and UserError for a file that is no view and does not become one.
        """
        give_up_at = time.monotonic() + READ_S
        while True:
            number = max(self._newest_number(), at_least)
            if not number:
                return None
            path = self._path(number)
            try:
                return self._read(path, number)
            except OSError:
                if time.monotonic() > give_up_at:
                    raise
            except (ValueError, KeyError, TypeError, AttributeError):
                if time.monotonic() > give_up_at:
                    raise UserError(
                        f"{path}: not a view of the run's nodes: remove this file once no node trains the run"
                    ) from None
            time.sleep(PAUSE_S)

    def _read(self, path: Path, number: int) -> ViewRecord:
        view = ViewRecord.from_json(json.loads(path.read_text()))
        if view.number != number:
            raise ValueError("a view of another number")
        return view

    async def announce(self, view: ViewRecord) -> ViewRecord:
        with contextlib.suppress(OSError, UserError):  # the next claim tells of what stays
            return await asyncio.to_thread(self._announce, view)
        return view

    def _announce(self, view: ViewRecord) -> ViewRecord:
        (self._folder / ALIVE).write_text(f"{view.number} {secrets.token_hex(4)}")
        return (self._newest_number() > view.number and self._read_newest()) or view

    async def sign_of_life(self) -> str:
        with contextlib.suppress(OSError):
            return await asyncio.to_thread((self._folder / ALIVE).read_text)
        return ""
