"""Where nodes find each other, and what lets only one view follow another: a folder that all share."""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import time
from pathlib import Path
from typing import Protocol

from ptune_dist.common.files import explain
from ptune_dist.errors import UserError
from ptune_dist.nodes.turns import ViewRecord

SUFFIX = ".json"
ALIVE = "alive"
READ_TRIES = 50  # a tenth of a second apart: a file that was just made may not be seen at once on a network disk
PAUSE_S = 0.1
RETRY_S = 1.0
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
    """One file for each view. A file is made whole and then linked to its name, which only the first can do."""

    def __init__(self, folder: Path):
        self._folder = folder

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
        while True:
            with contextlib.suppress(OSError):  # the disk is away: a change of view waits for it
                return await asyncio.to_thread(self._claim, view)
            await asyncio.sleep(RETRY_S)

    def _claim(self, view: ViewRecord) -> ViewRecord:
        path = self._folder / f"view-{view.number:08d}{SUFFIX}"
        data = json.dumps(view.to_json(), sort_keys=True)
        temporary = self._folder / f".{path.name}-{secrets.token_hex(8)}"
        temporary.write_text(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            with contextlib.suppress(FileExistsError), open(path, "x") as file:
                file.write(data)
        finally:
            temporary.unlink(missing_ok=True)
        newest = self._newest_number()
        number = max(view.number, newest)  # whoever comes late to an old number hears of the newest view
        return self._read(self._folder / f"view-{number:08d}{SUFFIX}")

    def _read(self, path: Path) -> ViewRecord:
        error: Exception = OSError()
        for _ in range(READ_TRIES):
            try:
                return ViewRecord.from_json(json.loads(path.read_text()))
            except (OSError, ValueError) as failed:
                error = failed
            time.sleep(PAUSE_S)
        raise OSError(f"{path}: {error}")

    def _newest_number(self) -> int:
        names = [name for name in os.listdir(self._folder) if name.startswith("view-") and name.endswith(SUFFIX)]
        return max((int(name[len("view-") : -len(SUFFIX)]) for name in names), default=0)

    async def latest(self) -> ViewRecord | None:
        with contextlib.suppress(OSError):
            return await asyncio.to_thread(self._latest)
        await asyncio.sleep(RETRY_S)
        return await self.latest()

    def _latest(self) -> ViewRecord | None:
        number = self._newest_number()
        return self._read(self._folder / f"view-{number:08d}{SUFFIX}") if number else None

    async def announce(self, view: ViewRecord) -> ViewRecord:
        with contextlib.suppress(OSError):
            return await asyncio.to_thread(self._announce, view)
        return view

    def _announce(self, view: ViewRecord) -> ViewRecord:
        (self._folder / ALIVE).write_text(f"{view.number} {secrets.token_hex(4)}")
        number = self._newest_number()
        return self._read(self._folder / f"view-{number:08d}{SUFFIX}") if number > view.number else view

    async def sign_of_life(self) -> str:
        with contextlib.suppress(OSError):
            return await asyncio.to_thread((self._folder / ALIVE).read_text)
        return ""
