"""`l40sctl switch-pattern`: asks for a pattern and follows the change to its end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from l40sd.cli_base import EXIT_FAILED, EXIT_INTERRUPTED, Session, common, complete_pattern, leave
from l40sd.cli_layout import preview_view
from l40sd.cli_status import percent, span
from l40sd.client import UNREACHABLE
from l40sd.core.errors import L40sError
from l40sd.core.messages import ChangePreview, OperationStatus, PatternRequest, Status, encode

POLL_S = 0.2
AWAY_LIMIT_S = 60.0
"""How long the daemon may be away in the middle of a change: a restarted one carries on with it."""
UNDER_WAY = ("running", "rolling_back")

Show = Callable[[OperationStatus], None]


@click.command("switch-pattern")
@click.argument("name", shell_complete=complete_pattern)
@click.option("--dry-run", is_flag=True, help="Show each GPU before and after, the order, and the lowest capacity.")
@click.option("--no-wait", is_flag=True, help="Print the operation's id and leave.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Stop watching after S seconds.")
@click.option("--force", is_flag=True, help="Allow GPU groups that cross sockets.")
@common
@click.pass_obj
def switch_pattern(
    session: Session, name: str, *, dry_run: bool, no_wait: bool, timeout_s: float | None, force: bool
) -> None:
    """Change the host to pattern NAME while it serves.

    Ctrl-C, --timeout and --no-wait leave the change running. Ends with 0 when the pattern is in force and with 1
    when it went back to the old one.
    """
    wish = PatternRequest(name=name, dry_run=dry_run, force=force)
    if dry_run:
        preview = session.client.ask("/v1/pattern", wish, ChangePreview)
        session.show(preview, preview_view(preview))
        return
    operation = session.client.ask("/v1/pattern", wish, dict[str, str]).get("operation", "")
    if no_wait:
        session.data(encode({"operation": operation})) if session.is_json else click.echo(operation)
        return
    try:
        with _display(session, name) as show:
            ended = _follow(session, operation, name, show, timeout_s)
    except KeyboardInterrupt:
        session.say(f"The change to {name} goes on without this command: l40sctl status --watch", "yellow")
        leave(EXIT_INTERRUPTED)
    _report(session, ended, timeout_s)


def _follow(session: Session, operation: str, name: str, show: Show, timeout_s: float | None) -> OperationStatus:
    """Return the operation once it has ended, or as it is after ``timeout_s``.

    1. A daemon that does not answer is waited for, ``AWAY_LIMIT_S`` at most: its successor carries on.
    2. The successor may know the change under another id; it is then the change in its status.

    Raises:
        L40sError: The daemon stays away, or refuses to tell.
    """
    began_s = answered_s = time.monotonic()
    while True:
        try:
            status = _operation(session, operation, name)
            operation, answered_s = status.id, time.monotonic()
            show(status)
            if status.state not in UNDER_WAY or (timeout_s is not None and answered_s - began_s > timeout_s):
                return status
        except L40sError as error:
            if error.code != UNREACHABLE or time.monotonic() - answered_s > AWAY_LIMIT_S:  # 1
                raise
        time.sleep(POLL_S)


def _operation(session: Session, operation: str, name: str) -> OperationStatus:
    try:
        return session.client.get(f"/v1/operations/{operation}", OperationStatus)
    except L40sError as error:
        if error.code != "unknown_operation":
            raise
    status = session.client.get("/v1/status", Status)  # 2
    if status.operation is not None:
        return status.operation
    is_there = status.pattern == name
    return OperationStatus(
        id=operation,
        pattern=name,
        previous="",
        state="done" if is_there else "failed",
        done=sum(worker.phase == "ready" for worker in status.workers),
        total=len(status.workers),
        why="" if is_there else f"the daemon was restarted and is at pattern {status.pattern}",
    )


@contextmanager
def _display(session: Session, name: str) -> Iterator[Show]:
    """Show the change on stderr: a bar on a terminal, elsewhere one line for each change of step."""
    if not session.err.is_terminal:
        seen: set[str] = set()

        def say_once(status: OperationStatus) -> None:
            line = f"{status.done} of {status.total} ready" + (f": {status.step}" if status.step else "")
            if line not in seen:
                seen.add(line)
                session.say(f"{name}: {line}")

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
        task = progress.add_task(f"pattern {name}", total=1, lowest="100 %", step="")

        def draw(status: OperationStatus) -> None:
            description = f"pattern {name}" if status.state == "running" else f"back to {status.previous}"
            progress.update(
                task,
                description=description,
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
    match ended.state:
        case "done":
            if not session.is_json:
                session.out.print(
                    f"[green]pattern {ended.pattern}[/]: {ended.done} of {ended.total} workers ready {took},"
                    f" never below {percent(ended.lowest_ready)} of the ready capacity"
                )
            return
        case "running" | "rolling_back":
            assert timeout_s is not None
            what = f"not done after {timeout_s:g} s ({ended.done} of {ended.total} ready); it goes on"
            hint = "l40sctl status --watch"
        case "rolled_back":
            what, hint = f"went back to {ended.previous} {took}: {ended.why}", "l40sctl events"
        case "replaced":
            what, hint = f"replaced by another change {took}: {ended.why}", "l40sctl status"
        case _:
            what, hint = f"{ended.state} {took}: {ended.why}", "l40sctl events"
    if session.is_json:
        leave(EXIT_FAILED)
    raise L40sError(what, where=f"pattern {ended.pattern}", hint=hint, code=ended.state)
