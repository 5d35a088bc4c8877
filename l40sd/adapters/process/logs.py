"""Read a worker's rotating output: its end, or as it comes."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

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


def tail(path: Path, lines: int) -> list[str]:
    """Return the last lines, oldest first, from the current file and as many older ones as it takes.

    Reads at most 1 MiB. Colours are taken out, other control characters and invalid UTF-8 are escaped, and
    a line is cut at 2000 characters: the result may go to any terminal. Blocks on the disk.
    """
    data = b""
    for file in generations(path):
        data = read_end(file, TAIL_BYTES - len(data)) + data
        if data.count(b"\n") > lines or len(data) >= TAIL_BYTES:
            break
    found = data.split(b"\n")
    if found and not found[-1]:
        found.pop()
    return [printable(line) for line in found[-lines:]] if lines > 0 else []


def last_run(path: Path, instance: str, limit_bytes: int) -> list[str]:
    """Return what one instance said, at most its last ``limit_bytes``, in lines as ``tail`` makes them.

    The file is the worker's: what an earlier instance said is left out. Blocks on the disk.
    """
    data = b""
    for file in generations(path):
        data = read_end(file, limit_bytes - len(data)) + data
        if len(data) >= limit_bytes:
            break
    start = data.rfind(f"{NOTE}{instance} starts".encode())
    return [printable(line) for line in data[max(start, 0) :].split(b"\n") if line]


async def follow(path: Path, *, poll_s: float = POLL_S) -> AsyncIterator[bytes]:
    """Yield what is written from now on, in chunks of at most 64 KiB, across rotations and restarts.

    Looks every ``poll_s``; ends never. What is rotated away before it was read is lost, as with ``tail -F``.
    """
    descriptor = open_or_none(path)
    if descriptor is not None:
        os.lseek(descriptor, 0, os.SEEK_END)
    try:
        while True:
            if descriptor is not None:
                # First look whether there is a successor, then read: what came before it is not missed.
                successor = await asyncio.to_thread(open_next, path, descriptor)
                try:
                    while data := await asyncio.to_thread(os.read, descriptor, CHUNK_BYTES):
                        yield data
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


async def printable_lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield output as it comes, line by line and made printable like ``tail``'s: it goes to a terminal as well.

    A progress bar that goes back to the start of its line is shown as one line after the other. A line is shown once
    it has ended; of one that grows past what is shown, the beginning at once and the rest never.
    """
    rest, is_cut = b"", False
    async for part in parts:
        *lines, rest = _LINE_ENDS.split(rest + part)
        shown = [printable(line) for line in (lines[1:] if is_cut else lines)]
        is_cut = is_cut and not lines
        if len(rest) > 4 * LINE_LIMIT:
            if not is_cut:
                shown.append(printable(rest))
            rest, is_cut = b"", True
        if shown:
            yield "".join(f"{line}\n" for line in shown).encode()


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


def read_end(path: Path, limit: int) -> bytes:
    """Return at most the last ``limit`` bytes of a file; nothing when it is gone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
            return file.read(limit)
    except OSError:
        return b""


def printable(line: bytes) -> str:
    """Return a line that does nothing to a terminal."""
    text = COLOURS.sub("", line[: 4 * LINE_LIMIT].decode("utf-8", "backslashreplace")).rstrip("\r")
    text = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LINE_LIMIT else f"{text[:LINE_LIMIT]}..."
