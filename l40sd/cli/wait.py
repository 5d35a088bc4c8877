"""Follows what takes a while (a pattern change, a rolling restart) to its end; `l40sctl wait` is that alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from l40sd.cli.session import EXIT_FAILED, EXIT_INTERRUPTED, Session, common, leave
from l40sd.cli.status import heading, percent, span
from l40sd.codec import encode
from l40sd.control.client import UNREACHABLE
from l40sd.control.messages import Accepted, OperationStatus, Status
from l40sd.errors import L40sError
from l40sd.model import OperationKind, OperationState

POLL_S = 0.2
AWAY_LIMIT_S = 60.0
"""How long the daemon may be away in the middle of a change: a restarted one carries on with it."""

Show = Callable[[OperationStatus], None]


@click.command()
@click.argument("operation", required=False)
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Stop watching after S seconds.")
@common
@click.pass_obj
def wait(session: Session, operation: str | None, timeout_s: float | None) -> None:
    """Follow a change or a rolling restart to its end: OPERATION, as --no-wait printed it, or what is under way.

    Ends as the command that began it would have: 0 when it is done, 1 when not.
    """
    if operation is None:
        now = session.client.get("/v1/status", Status).operation
        if now is None:
            session.say("nothing is under way")
            return
        operation = now.id
    else:
        session.client.get(f"/v1/operations/{operation}", OperationStatus)  # an unknown one is told at once
    follow_to_end(session, operation, timeout_s=timeout_s)


def begin(session: Session, accepted: Accepted, *, no_wait: bool, timeout_s: float | None, pattern: str = "") -> None:
    """Go on from an answer of the daemon: tell what it notes, then print the operation's id or follow it to its end."""
    for note in accepted.notes:
        session.say(f"! {note}", "yellow")
    if not no_wait:
        follow_to_end(session, accepted.operation, timeout_s=timeout_s, pattern=pattern)
    elif session.is_json:
        session.data(encode({"operation": accepted.operation}))
    else:
        click.echo(accepted.operation)


def follow_to_end(session: Session, operation: str, *, timeout_s: float | None, pattern: str = "") -> None:
    """Show an operation until it has ended, then say how, and end with the exit status that goes with it.

    Args:
        pattern: Where a change leads, for a daemon that was restarted and does not know the operation any more.
    """
    try:
        with _display(session) as show:
            ended = _follow(session, operation, pattern, show, timeout_s)
    except KeyboardInterrupt:
        session.say(f"It goes on without this command: l40sctl wait {operation}", "yellow")
        leave(EXIT_INTERRUPTED)
    _report(session, ended, timeout_s)


def _follow(session: Session, operation: str, pattern: str, show: Show, timeout_s: float | None) -> OperationStatus:
    """Return the operation once it has ended, or as it is after ``timeout_s``.

    1. A daemon that does not answer is waited for, ``AWAY_LIMIT_S`` at most: its successor carries on.
    2. The successor may know the change under another id; it is then the change in its status.

    Raises:
        L40sError: The daemon stays away, or refuses to tell.
    """
    began_s = answered_s = time.monotonic()
    while True:
        try:
            status = _operation(session, operation, pattern)
            operation, answered_s = status.id, time.monotonic()
            show(status)
            if not status.is_under_way or (timeout_s is not None and answered_s - began_s > timeout_s):
                return status
        except L40sError as error:
            if error.code != UNREACHABLE or time.monotonic() - answered_s > AWAY_LIMIT_S:  # 1
                raise
        time.sleep(POLL_S)


def _operation(session: Session, operation: str, pattern: str) -> OperationStatus:
    try:
        return session.client.get(f"/v1/operations/{operation}", OperationStatus)
    except L40sError as error:
        if error.code != "unknown_operation" or not pattern:
            raise
    status = session.client.get("/v1/status", Status)  # 2
    if status.operation is not None:
        return status.operation
    is_there = status.pattern == pattern
    return OperationStatus(
        id=operation,
        pattern=pattern,
        previous="",
        state=OperationState.DONE if is_there else OperationState.FAILED,
        done=sum(worker.phase == "ready" for worker in status.workers),
        total=len(status.workers),
        why="" if is_there else f"the daemon was restarted and is at pattern {status.pattern}",
    )


@contextmanager
def _display(session: Session) -> Iterator[Show]:
    """Show the operation on stderr: a bar on a terminal, elsewhere one line for each change of step."""
    if not session.err.is_terminal:
        seen: set[str] = set()

        def say_once(status: OperationStatus) -> None:
            line = f"{heading(status)}: {status.done} of {status.total} ready"
            line += f": {status.step}" if status.step else ""
            if line not in seen:
                seen.add(line)
                session.say(line)

        yield say_once
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("[dim]lowest {task.fields[lowest]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[step]}", markup=False),
    )
    with Progress(*columns, console=session.err, transient=True) as progress:
        task = progress.add_task("", total=1, lowest="100 %", step="")

        def draw(status: OperationStatus) -> None:
            progress.update(
                task,
                description=heading(status),
                total=max(1, status.total),
                completed=status.done,
                lowest=percent(status.lowest_ready),
                step=status.step,
            )

        yield draw


def _report(session: Session, ended: OperationStatus, timeout_s: float | None) -> None:
    """Say how it ended, and end with the exit status that goes with it."""
    if session.is_json:
        session.data(encode(ended))
    took = f"after {span(ended.duration_s)}"
    is_restart = ended.kind == OperationKind.RESTART
    match ended.state:
        case OperationState.DONE:
            if not session.is_json:
                session.out.print(_done(ended, took))
            return
        case OperationState.RUNNING | OperationState.ROLLING_BACK:
            what = f"not done after {timeout_s or 0:g} s ({ended.done} of {ended.total} ready); it goes on"
            hint = f"l40sctl wait {ended.id}"
        case OperationState.ROLLED_BACK:
            what, hint = f"went back to {ended.previous} {took}: {ended.why}", "l40sctl events"
        case OperationState.REPLACED:
            what, hint = f"replaced {took}: {ended.why}", "l40sctl wait; l40sctl status"
        case OperationState.INCOMPLETE:
            what = f"in place {took} but for {ended.why}"
            hint = "it is tried again as ever; l40sctl status; l40sctl reset WORKER where it was given up"
        case _:
            what = f"{'ended' if is_restart else ended.state} {took}: {ended.why}"
            hint = "l40sctl status" if is_restart else "l40sctl events"
    if session.is_json:
        leave(EXIT_FAILED)
    raise L40sError(what, where="restart" if is_restart else f"pattern {ended.pattern}", hint=hint, code=ended.state)


def _done(ended: OperationStatus, took: str) -> str:
    """Return how it went well. What left service is told instead of a capacity that it no longer counts in."""
    if ended.kind == OperationKind.RESTART:
        head = f"[green]restart[/]: {ended.done} of {ended.total} workers are back {took}"
    else:
        head = f"[green]pattern {ended.pattern}[/]: {ended.done} of {ended.total} workers ready {took}"
    if ended.leaving:
        return f"{head}; {', '.join(ended.leaving)} left service"
    return f"{head}, never below {percent(ended.lowest_ready)} of the ready capacity"
