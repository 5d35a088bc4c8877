"""Read a worker's rotating output: its end, or as it comes."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

TAIL_BYTES = 1 << 20
"""The most that is read for a tail, however long the lines are."""
LINE_LIMIT = 2000
"""Characters of one line that are shown."""
CHUNK_BYTES = 64 << 10
NOTE = "--- l40sd: "
"""How the shim's own lines begin."""
POLL_S = 0.2
_LINE_ENDS = re.compile(rb"\r*\n|\r+(?![\r\n]|\Z)")
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place in a rotating log that stays the same place over rotations; as text ``INODE:OFFSET``.

    Inode 0 is no file: the log's very beginning.
    """

    inode: int
    offset: int

    def __str__(self) -> str:
        return f"{self.inode}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the position that ``str`` wrote.

        Raises:
            ValueError: It is none.
        """
        match = re.fullmatch(r"([0-9]{1,20}):([0-9]{1,20})", text)
        if match is None:
            raise ValueError(f"{text[:40]!r} is no position in a log")
        return cls(inode=int(match[1]), offset=int(match[2]))


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines, oldest first, from the current file and as many older ones as it takes.

    Reads at most 1 MiB. Colours are taken out, other control characters and invalid UTF-8 are escaped, and
    a line is cut at 2000 characters: the result may go to any terminal. Blocks on the disk.
    """
    found = _end_of(path, lines)[0].split(b"\n")
    if found and not found[-1]:
        found.pop()
    return [printable(line) for line in found[-lines:]] if lines > 0 else []


def tail_to_resume(path: Path, lines: int) -> tuple[list[str], Position]:
    """Return the last whole lines as ``tail`` does, and where to go on; a line that has not ended comes from there."""
    data, end = _end_of(path, lines)
    *found, rest = data.split(b"\n")
    position = Position(inode=end.inode, offset=max(0, end.offset - len(rest)))
    return [printable(line) for line in found[-lines:]] if lines > 0 else [], position


def _end_of(path: Path, lines: int) -> tuple[bytes, Position]:
    """Return the last 1 MiB, or less where that holds so many lines, and where in the newest file it ends."""
    data, end = b"", Position(inode=0, offset=0)
    for file in generations(path):
        part, its_end = read_end(file, TAIL_BYTES - len(data))
        data, end = part + data, end if end.inode else its_end
        if data.count(b"\n") > lines or len(data) >= TAIL_BYTES:
            break
    return data, end


def last_run(path: Path, instance: str, limit_bytes: int) -> list[str]:
    """Return what one instance said, at most its last ``limit_bytes``, in lines as ``tail`` makes them.

    The file is the worker's: what an earlier instance said is left out. Blocks on the disk.
    """
    data = b""
    for file in generations(path):
        data = read_end(file, limit_bytes - len(data))[0] + data
        if len(data) >= limit_bytes:
            break
    start = data.rfind(f"{NOTE}{instance} starts".encode())
    return [printable(line) for line in data[max(start, 0) :].split(b"\n") if line]


async def follow(
    path: Path, begin: Position | None = None, *, poll_s: float = POLL_S
) -> AsyncIterator[tuple[bytes, Position]]:
    """Yield what is written, in chunks of at most 64 KiB, each with where it ends; across rotations and restarts.

    Looks every ``poll_s``; ends never. What is rotated away before it was read is lost, as with ``tail -F``.

    Args:
        begin: From there on, or from the oldest file that is left where that one has been rotated away. By default
            from the present end.
    """
    descriptor = open_or_none(path) if begin is None else _open_at(path, begin)
    if descriptor is not None and begin is None:
        os.lseek(descriptor, 0, os.SEEK_END)
    try:
        while True:
            if descriptor is not None:
                # First look whether there is a successor, then read: what came before it is not missed.
                successor = await asyncio.to_thread(open_next, path, descriptor)
                inode = os.fstat(descriptor).st_ino
                try:
                    while data := await asyncio.to_thread(os.read, descriptor, CHUNK_BYTES):
                        yield data, Position(inode=inode, offset=os.lseek(descriptor, 0, os.SEEK_CUR))
                finally:
                    if successor is not None:
                        os.close(descriptor)
                        descriptor = successor
                if successor is not None:
                    continue
            else:
                descriptor = open_or_none(path)
            await asyncio.sleep(poll_s)
    finally:
        if descriptor is not None:
            os.close(descriptor)


async def printable_lines(parts: AsyncIterator[tuple[bytes, Position]]) -> AsyncIterator[tuple[str, Position]]:
    """Yield output as it comes, line by line and made printable like ``tail``'s: it goes to a terminal as well.

    A progress bar that goes back to the start of its line is shown as one line after the other. A line is shown once
    it has ended; of one that grows past what is shown, the beginning at once and the rest never. Each text comes with
    where it ends: whoever follows from there sees what is not in it.
    """
    rest, is_cut = b"", False
    async for part, end in parts:
        *lines, rest = _LINE_ENDS.split(rest + part)
        shown = [printable(line) for line in (lines[1:] if is_cut else lines)]
        is_cut = is_cut and not lines
        if len(rest) > 4 * LINE_LIMIT:
            if not is_cut:
                shown.append(printable(rest))
            rest, is_cut = b"", True
        if shown:
            position = Position(inode=end.inode, offset=max(0, end.offset - len(rest)))
            yield "".join(f"{line}\n" for line in shown), position


def _open_at(path: Path, position: Position) -> int | None:
    """Open the file of a position at its offset; the oldest that is left where that file is gone."""
    files = generations(path)
    for file in files:
        descriptor = open_or_none(file)
        if descriptor is None:
            continue
        found = os.fstat(descriptor)
        if found.st_ino == position.inode and found.st_size >= position.offset:
            os.lseek(descriptor, position.offset, os.SEEK_SET)
            return descriptor
        os.close(descriptor)
    return open_or_none(files[-1]) if files else None


def generations(path: Path) -> list[Path]:
    """Return the files of one log that exist, newest first; there is a gap while they are being rotated."""
    older = [file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdecimal()]
    older.sort(key=lambda file: int(file.suffix[1:]))
    return [path, *older] if path.exists() else older


def open_next(path: Path, descriptor: int) -> int | None:
    """Open the file that follows an open one; None while that is the current one, or while they are being rotated.

    A rotation renames the oldest first. So if ours still has its name after the successor was opened, then the
    successor had its name too. One that was rotated out altogether is followed by the oldest there is.
    """
    mine = os.fstat(descriptor)
    files = generations(path)
    for newer, file in zip([None, *files], files, strict=False):
        try:
            if not os.path.samestat(file.stat(), mine):
                continue
            successor = open_or_none(newer) if newer is not None else None
            if successor is None or os.path.samestat(file.stat(), mine):
                return successor
            os.close(successor)
        except FileNotFoundError:
            pass
        return None
    return open_or_none(files[-1]) if files else None


def open_or_none(path: Path) -> int | None:
    """Open for reading; None when it is not there (yet)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def read_end(path: Path, limit: int) -> tuple[bytes, Position]:
    """Return at most the last ``limit`` bytes of a file and where they end; nothing when it is gone."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            file.seek(max(0, found.st_size - limit))
            data = file.read(limit)
            return data, Position(inode=found.st_ino, offset=file.tell())
    except OSError:
        return b"", Position(inode=0, offset=0)


def printable(line: bytes) -> str:
    """Return a line that does nothing to a terminal."""
    text = COLOURS.sub("", line[: 4 * LINE_LIMIT].decode("utf-8", "backslashreplace")).rstrip("\r")
    text = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LINE_LIMIT else f"{text[:LINE_LIMIT]}..."
