"""The daemon's log: structlog events on stderr, in the form that whoever reads stderr wants.

    stderr is                 one line is
    the journal               <4>worker.exited m-gpu0: ended by signal 9  model=m ran_s=17.0
    a terminal                coloured text (NO_COLOR: plain)
    anything else             time=... level=info event=worker.ready ...

systemd takes the priority off and adds the time; the message comes first, for whoever is called at night. With
``log_format = "json"`` the line in the journal is JSON after the priority, and elsewhere, but on a terminal, JSON.

JSON and key=value have the wall clock (``time``, ISO 8601, UTC) for people and a monotonic time (``mono_s``) for
arithmetic. Events of info and above also go to one callable, the ring behind `l40sctl events`, whatever the level.
"""

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from l40sd.event_line import text_of, told

EventSink = Callable[[str, str, Mapping[str, Any]], None]
"""Called with (level, event, data); data is plain JSON. Must neither block nor log."""

_RANKS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}  # sd-daemon(3)
_OURS = ("time", "mono_s", "level", "event")

# Global as structlog's own configuration is: one process, one log.
_level = "info"
_sink: EventSink | None = None


def configure(
    level: str = "info",
    *,
    log_format: str = "text",
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
    on_event: EventSink | None = None,
) -> None:
    """Send all logging of this process to ``stream`` (stderr), from ``level`` up.

    The standard library's loggers (asyncio, aiohttp) come out as ``library.message``, from warning up.
    """
    stream = sys.stderr if stream is None else stream
    environ = os.environ if environ is None else environ
    set_level(level)
    set_sink(on_event)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _add_times,
            structlog.dev.set_exc_info,
            structlog.processors.format_exc_info,
            _hand_to_sink,
            _drop_below_level,
            _renderer(stream, environ, log_format),
        ],
        wrapper_class=structlog.BoundLogger,
        logger_factory=lambda *_: _Writer(stream),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_FromLibraries()]
    root.setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Log from this level up from now on (a reload may change it)."""
    global _level
    assert level in _RANKS, level
    _level = level


def set_sink(on_event: EventSink | None) -> None:
    """Hand every event of info and above to ``on_event`` from now on; None: to nobody."""
    global _sink
    _sink = on_event


def for_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Return whether ``stream`` goes to systemd's journal.

    1. A terminal never does, even below a unit (a terminal emulator that is a user service).
    2. $JOURNAL_STREAM names the device and inode of the journal's socket [systemd.exec(5)].
    3. Without it, $INVOCATION_ID says that a unit runs us, with its output sent elsewhere on purpose.
    """
    if stream.isatty():  # 1
        return False
    named = environ.get("JOURNAL_STREAM")
    if named is None:  # 3
        return "INVOCATION_ID" in environ
    try:  # 2
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file behind it (a test's StringIO), or closed
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


class _Writer:
    """Writes lines; a full disk or a reader that is gone must not take the daemon with it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            pass

    debug = info = warning = error = critical = exception = msg


class _FromLibraries(logging.Handler):
    """Passes on what libraries log through the standard library."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        method = log.error if record.levelno >= logging.ERROR else log.warning
        method("library.message", logger=record.name, message=record.getMessage(), exc_info=record.exc_info)


def _add_times(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
    event["mono_s"] = round(time.monotonic(), 3)
    return event


def _hand_to_sink(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if _sink is not None and _RANKS[event["level"]] >= _RANKS["info"]:
        data = {key: plain(value) for key, value in event.items() if key not in _OURS}
        _sink(event["level"], str(event["event"]), data)
    return event


def _drop_below_level(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    if _RANKS[event["level"]] < _RANKS[_level]:
        raise structlog.DropEvent
    return event


def plain(value: Any) -> Any:
    """Return a value as JSON knows it; what JSON does not know becomes its text."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)  # JSON has neither nan nor infinity
        case None | bool() | int() | float():
            return value
        case str():
            return value.encode(errors="backslashreplace").decode()  # a file name may be no text at all
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted((plain(item) for item in value), key=str)
        case Sequence() if not isinstance(value, (bytes, bytearray)):
            return [plain(item) for item in value]
        case _:
            return str(value)


def _renderer(stream: TextIO, environ: Mapping[str, str], log_format: str) -> Processor:
    if for_journal(stream, environ):
        return _journal_json if log_format == "json" else _journal_line
    if stream.isatty():
        return _TerminalLine(colors=not environ.get("NO_COLOR"))
    return _json_line if log_format == "json" else _key_value_line


def _journal_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """``EVENT [WORKER][: REASON]``, then the other keys: what says most comes first, what is long last."""
    data = {key: plain(value) for key, value in event.items() if key not in _OURS}
    subject, reason, rest = told(str(event["event"]), data)
    line = f"<{_PRIORITIES[event['level']]}>{subject}" + (f": {reason}" if reason else "")
    keys = " ".join(f"{_word(key)}={_word(value)}" for key, value in rest)
    return f"{line}  {keys}" if keys else line


def _journal_json(logger: WrappedLogger, method: str, event: EventDict) -> str:
    return f"<{_PRIORITIES[event['level']]}>{_json_line(logger, method, event)}"


def _json_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    ordered = {"event": event["event"], "level": event["level"], **event}
    return json.dumps(plain(ordered), ensure_ascii=False)


def _key_value_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """One line whatever the values are: what is not a plain word is written as JSON writes it."""
    ordered = {key: event[key] for key in _OURS} | dict(event)
    return " ".join(f"{_word(str(key))}={_word(_text(value))}" for key, value in ordered.items())


def _text(value: Any) -> str:
    return text_of(plain(value))


def _word(text: str) -> str:
    return text if re.fullmatch(r"[^\s\"=\x00-\x1f\x7f]+", text) else json.dumps(text, ensure_ascii=False)


class _TerminalLine:
    """structlog's console line with the time cut to the second and without ``mono_s``."""

    def __init__(self, *, colors: bool) -> None:
        self._render = structlog.dev.ConsoleRenderer(
            colors=colors, timestamp_key="time", pad_event_to=24, exception_formatter=structlog.dev.plain_traceback
        )

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> str:
        event = {key: value if isinstance(value, str) else _text(value) for key, value in event.items()}
        event.pop("mono_s", None)
        event["time"] = datetime.fromisoformat(event["time"]).astimezone().strftime("%H:%M:%S")
        return str(self._render(logger, method, event))
