"""What a log line looks like to whoever reads it, and what reaches `l40sctl events`."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from l40sd import log

PROGRAM = """
import structlog
from l40sd import log
log.configure("info")
structlog.get_logger().bind(worker="m-gpu0").warning("worker.unready", gpus=(0, 1), why="two words")
"""


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    log.set_sink(None)
    root.handlers[:] = handlers
    root.setLevel(level)


def written(environ: dict[str, str]) -> str:
    """Return what PROGRAM writes on its stderr, a pipe."""
    done = subprocess.run(  # noqa: TID251 - no loop here
        [sys.executable, "-c", PROGRAM],
        env={**without_systemd(), **environ},
        stderr=subprocess.PIPE,
        timeout=30,
        check=True,
    )
    return done.stderr.decode()


def without_systemd() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("JOURNAL_STREAM", "INVOCATION_ID")}


def test_into_a_pipe_a_line_is_key_value_without_colour() -> None:
    line = written({})
    assert "\x1b" not in line
    assert re.fullmatch(
        r"time=\S+ mono_s=\S+ level=warning event=worker.unready worker=m-gpu0 gpus=0,1 why=\"two words\"\n", line
    )


def test_below_a_unit_the_message_comes_first_and_the_keys_after() -> None:
    """At 3 a.m. `journalctl -u l40sd` was JSON from edge to edge."""
    assert written({"INVOCATION_ID": "x"}) == "<4>worker.unready m-gpu0: two words  gpus=0,1\n"


def test_a_line_of_the_journal_is_one_line_and_drives_no_terminal() -> None:
    stream = io.StringIO()
    log.configure(stream=stream, environ={"INVOCATION_ID": "x"})
    structlog.get_logger().error(
        "worker.failed",
        last_lines=["a b", "c"],
        worker="m-gpu0",
        reason="no such file\n  hint: \x1b[2J",
        code=None,
        port=1,
    )
    structlog.get_logger().info("config.reloaded", changed=[])
    assert stream.getvalue().splitlines() == [
        '<3>worker.failed m-gpu0: no such file; hint: \\x1b[2J  port=1 last_lines="a b; c"',
        '<6>config.reloaded  changed=""',
    ]


@pytest.mark.parametrize(("environ", "before"), [({"INVOCATION_ID": "x"}, "<4>"), ({}, "")])
def test_json_is_there_for_the_asking(environ: dict[str, str], before: str) -> None:
    stream = io.StringIO()
    log.configure(log_format="json", stream=stream, environ=environ)
    structlog.get_logger().warning("worker.unready", worker="m-gpu0", gpus=(0, 1))
    text = stream.getvalue()
    assert text.startswith(before)
    data = json.loads(text.removeprefix(before))
    assert (data["event"], data["worker"], data["gpus"]) == ("worker.unready", "m-gpu0", [0, 1])
    assert {"time", "mono_s"} <= data.keys()


def test_journal_stream_decides_by_the_file_behind_stderr() -> None:
    read_end, write_end = os.pipe()
    found = os.fstat(write_end)
    with os.fdopen(write_end, "w") as stream:
        assert log.for_journal(stream, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        assert not log.for_journal(stream, {"JOURNAL_STREAM": "1:1", "INVOCATION_ID": "x"})
    os.close(read_end)


@pytest.mark.parametrize(("no_color", "has_colour"), [("", True), ("1", False)])
def test_on_a_terminal_colour_is_as_asked(no_color: str, has_colour: bool) -> None:
    ours, theirs = pty.openpty()
    environ = {**without_systemd(), "NO_COLOR": no_color, "INVOCATION_ID": "a terminal started by a user unit"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environ, stderr=theirs)
    os.close(theirs)
    line = os.read(ours, 4096).decode()
    assert process.wait(30) == 0
    os.close(ours)
    assert ("\x1b[" in line) == has_colour
    assert "worker.unready" in line


def test_events_from_info_up_reach_the_sink_whatever_the_level() -> None:
    seen: list[tuple[str, str, Any]] = []
    stream = io.StringIO()
    log.configure("error", stream=stream, environ={}, on_event=lambda *event: seen.append(event))
    structlog.get_logger().debug("a.debug")
    structlog.get_logger().info("a.info", gpus={2, 1}, path=b"x", odd="\udcff", rate=float("nan"))
    assert stream.getvalue() == ""
    [(level, event, data)] = seen
    assert (level, event) == ("info", "a.info")
    assert data == {"gpus": [1, 2], "path": "b'x'", "odd": "\\udcff", "rate": "nan"}
    log.set_level("debug")
    structlog.get_logger().debug("b.debug")
    assert "b.debug" in stream.getvalue()


def test_a_traceback_stays_on_one_line_and_libraries_are_heard() -> None:
    stream = io.StringIO()
    log.configure(stream=stream, environ={})
    try:
        raise KeyError("x")
    except KeyError:
        structlog.get_logger().exception("worker.failed")
    logging.getLogger("asyncio").warning("slow %s", "callback")
    first, second = stream.getvalue().splitlines()
    assert "KeyError: 'x'" in first
    assert 'event=library.message logger=asyncio message="slow callback"' in second


def test_a_reader_that_is_gone_does_not_end_the_daemon() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = open(write_end, "w", closefd=True)  # noqa: SIM115 - closing it flushes, which fails on purpose
    log.configure(stream=stream, environ={})
    structlog.get_logger().info("a.info")
    with pytest.raises(BrokenPipeError):
        stream.close()
    structlog.get_logger().info("b.info")
