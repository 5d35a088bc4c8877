"""One JSON file that is whole at every moment: what is wanted, kept over reboots."""

import asyncio
import contextlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from l40sd.errors import L40sError
from l40sd.shim.files import write_file


class Store:
    """The file, and its latest content when the disk does not take it.

    Attributes:
        degraded: Why the latest content is in memory only; empty when it is on disk.
        notes: What was odd when loading, one sentence each.
    """

    def __init__(self, path: Path, *, version: int) -> None:
        self.path = path
        self.degraded = ""
        self.notes: list[str] = []
        self._version = version
        self._writing = asyncio.Lock()
        self._pending: bytes | None = None

    async def load(self) -> dict[str, Any] | None:
        """Return the content; None when there is none yet, or none that can be read.

        What cannot be read is moved to ``.corrupt-TIME`` and noted.

        Raises:
            L40sError: A newer l40sd wrote it (``newer_state``), or the directory cannot be used.
        """
        return await asyncio.to_thread(self._load)

    async def save(self, content: Mapping[str, Any]) -> bool:
        """Write the content; False when the disk did not take it: then ``degraded`` says why, and it waits here.

        Of several calls at once the last one's content stays.
        """
        self._pending = msgspec.json.encode({"version": self._version, **content})
        return await self.retry()

    async def retry(self) -> bool:
        """Write what waits, if anything does; call it now and then. True when nothing waits any more."""
        async with self._writing:
            data = self._pending
            if data is None:
                return True
            try:
                await asyncio.to_thread(write_file, str(self.path), data)
            except OSError as error:
                self.degraded = f"state is kept in memory only: {self.path}: {error.strerror}"
                return False
            if self._pending is data:
                self._pending = None
            self.degraded = ""
            return True

    def _load(self) -> dict[str, Any] | None:
        try:
            self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            for left in self.path.parent.glob(f"{self.path.name}.tmp-*"):  # of a daemon killed while writing
                with contextlib.suppress(OSError):
                    left.unlink()
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise L40sError(
                f"cannot be read: {error.strerror}",
                where=str(error.filename or self.path),
                hint="check daemon.state_dir and who owns it",
                code="not_readable",
            ) from error
        try:
            content = msgspec.json.decode(data, type=dict[str, Any])
            version = msgspec.convert(content.pop("version", None), int)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._set_aside(str(error))
            return None
        if version > self._version:
            raise L40sError(
                f"written by a newer l40sd (version {version} of the format, this one reads {self._version})",
                where=str(self.path),
                hint="install the newer l40sd again, or move the file away: the pattern is then applied afresh",
                code="newer_state",
            )
        return content

    def _set_aside(self, problem: str) -> None:
        stamp = datetime.now().astimezone().strftime("%Y%m%dT%H%M%S")
        aside = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        try:
            self.path.rename(aside)
        except OSError as error:
            self.notes.append(f"{self.path} is corrupt ({problem}) and cannot be moved aside: {error.strerror}")
        else:
            self.notes.append(f"{self.path} was corrupt ({problem}), moved to {aside}")
