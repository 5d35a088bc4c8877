"""`l40sctl events` and `l40sctl logs`: what has happened, and with -f what happens, whichever daemon tells it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import TypeVar

import click

from l40sd.cli.moments import EXAMPLES, parse_moment
from l40sd.cli.session import Session, common, complete_worker
from l40sd.cli.status import event_line
from l40sd.control.client import UNREACHABLE, worker_path
from l40sd.control.messages import Event, LogPart
from l40sd.errors import L40sError

T = TypeVar("T")

RETRY_S = 0.5


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on until Ctrl-C, over restarts of the daemon.")
@click.option("--lines", "-n", type=click.IntRange(0), help="Only the last so many.")
@click.option("--since", metavar="WHEN", help=f"Only what came after this number, or since: {EXAMPLES}.")
@click.option("--worker", "-w", metavar="WORKER", shell_complete=complete_worker, help="Only this worker's.")
@common
@click.pass_obj
def events(session: Session, lines: int | None, since: str | None, worker: str | None, *, follow: bool) -> None:
    """Print what happened, oldest first.

    With -o json: one object a line.
    """
    query = _since(since) | ({"worker": worker} if worker else {}) | ({"follow": 1} if follow else {})
    last = {} if lines is None else {"last": lines}

    def begin(reached: Event | None) -> Iterator[Event]:
        return session.client.events(**{**query, **(last if reached is None else {"since": reached.seq})})

    with suppress(KeyboardInterrupt):
        for event in _kept_up(session, begin, follow=follow):
            session.show(event, event_line(event))


@click.command()
@click.argument("worker", shell_complete=complete_worker)
@click.option("--follow", "-f", is_flag=True, help="Go on until Ctrl-C, over restarts of the worker and of the daemon.")
@click.option("--lines", "-n", type=click.IntRange(0), default=100, show_default=True, help="Begin so many lines back.")
@common
@click.pass_obj
def logs(session: Session, worker: str, lines: int, *, follow: bool) -> None:
    """Print the WORKER's output, also of one that is not there any more."""
    with suppress(KeyboardInterrupt):
        if not follow:
            for data in session.client.stream(worker_path(worker, "logs"), tail=lines):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            return

        def begin(reached: LogPart | None) -> Iterator[LogPart]:
            where: dict[str, object] = {"tail": lines} if reached is None else {"from": reached.position}
            return session.client.log(worker, **where)

        for part in _kept_up(session, begin, follow=True):
            sys.stdout.buffer.write(part.text.encode("utf-8", "replace"))
            sys.stdout.buffer.flush()


def _since(text: str | None) -> dict[str, object]:
    """Return the part of the query that a number or a moment is."""
    if text is None:
        return {}
    if text.isascii() and text.isdigit():
        return {"since": text}
    try:
        return {"after": parse_moment(text, datetime.now().astimezone()).isoformat()}
    except ValueError as error:
        raise click.UsageError(f"--since: {error}") from error


def _kept_up(session: Session, begin: Callable[[T | None], Iterator[T]], *, follow: bool) -> Iterator[T]:
    """Yield what ``begin`` tells; when following, a daemon that goes away is waited for and told how far we are.

    Raises:
        L40sError: It is not there to begin with, or it refuses.
    """
    reached: T | None = None
    is_away = False
    if follow:
        session.client.get("/v1/version", dict[str, str])  # what is not there yet is not waited for
    while True:
        try:
            for each in begin(reached):
                if is_away:
                    session.say("l40sd is back")
                reached, is_away = each, False
                yield each
        except L40sError as error:
            if not follow or error.code != UNREACHABLE:
                raise
        if not follow:
            return
        if not is_away:
            session.say("l40sd is away: waiting for it; Ctrl-C ends", "yellow")
        is_away = True
        time.sleep(RETRY_S)
