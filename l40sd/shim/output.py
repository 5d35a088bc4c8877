# pathlib would cost every shim 5 ms and 1 MB.
# ruff: noqa: PTH105, PTH108
"""An engine's output in size-capped, rotating files: bytes as they are, never an exception, never growth."""

import contextlib
import os


class RotatingLog:
    """``PATH`` and, older and older, ``PATH.1`` to ``PATH.(files-1)``, each at most ``file_bytes`` long.

    A disk that takes nothing costs output, not the worker: bytes are dropped and counted, and ``tick`` writes
    a line saying how many as soon as it can.
    """

    def __init__(self, path: str, file_bytes: int, files: int) -> None:
        self.dropped_bytes = 0
        self._path = path
        self._cap = file_bytes
        self._files = files
        self._descriptor = -1
        self._size = 0
        self._at_line_start = True
        self._reason = ""
        self._open()

    def write(self, data: bytes) -> None:
        """Append; at the cap go on in a new file, after a whole line where there is one."""
        if self.dropped_bytes or self._descriptor < 0:
            self.dropped_bytes += len(data)
            return
        start = 0
        while start < len(data):
            if (start or self._size >= self._cap) and not self._rotate():
                self.dropped_bytes += len(data) - start
                return
            end = min(len(data), start + self._cap - self._size)
            if end < len(data):
                end = data.rfind(b"\n", start, end) + 1 or end
            written = self._put(memoryview(data)[start:end])
            if written < end - start:
                self.dropped_bytes += len(data) - start - written
                return
            start = end

    def note(self, text: str) -> None:
        """Append a line of the shim's own."""
        self.write(self._line(text))

    def tick(self) -> None:
        """Try again what failed; about once a second. Also makes the file anew that somebody removed."""
        with contextlib.suppress(OSError):
            if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink == 0:
                self.close()
        if self._descriptor < 0 and not self._open():
            return
        if self._size >= self._cap and self.dropped_bytes and not self._rotate():
            return
        if self.dropped_bytes:
            line = self._line(f"{self.dropped_bytes} bytes of output dropped: {self._reason}")
            before = self._size
            if self._put(line) == len(line):
                self.dropped_bytes = 0
            else:  # half a line says nothing: take it back
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, before)
                    self._size = before

    def close(self) -> None:
        """Close the file; nothing is buffered."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _line(self, text: str) -> bytes:
        start = "" if self._at_line_start else "\n"
        return f"{start}--- l40sd: {text}\n".encode("utf-8", "surrogateescape")

    def _open(self) -> bool:
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags, 0o640)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            self._reason = str(error.strerror)
            return False
        return True

    def _put(self, data: bytes | memoryview) -> int:
        """Return how many bytes the disk took."""
        view = memoryview(data)
        while view:
            try:
                count = os.write(self._descriptor, view)
            except OSError as error:
                self._reason = str(error.strerror)
                break
            self._size += count
            self._at_line_start = view[count - 1] == 0x0A
            view = view[count:]
        return len(data) - len(view)

    def _rotate(self) -> bool:
        self.close()
        try:
            for age in range(self._files - 1, 0, -1):
                older = f"{self._path}.{age}"
                newer = f"{self._path}.{age - 1}" if age > 1 else self._path
                with contextlib.suppress(FileNotFoundError):
                    os.replace(newer, older)
            if self._files == 1:
                os.unlink(self._path)
        except OSError as error:
            self._reason = str(error.strerror)
        # A full file that could not be moved stays the current one: it would grow past the cap.
        return self._open() and self._size < self._cap
