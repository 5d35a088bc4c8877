"""What every l40sctl command shares: where to ask, how to print, and what an error's exit status is."""

import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TextIO, TypeVar, cast

import click
from click.shell_completion import CompletionItem
from rich.console import Console, RenderableType

from l40sd.codec import encode
from l40sd.control.client import UNREACHABLE, Client, socket_path
from l40sd.control.messages import ErrorBody, PatternView, WorkerStatus
from l40sd.errors import L40sError

F = TypeVar("F", bound=Callable[..., Any])

EXIT_FAILED, EXIT_MISUSE, EXIT_NOT_SERVING, EXIT_NO_WORKER, EXIT_UNREACHABLE = 1, 2, 3, 4, 5
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C
EXIT_NO_READER = 141  # as a shell reports SIGPIPE

PIPED_WIDTH = 1000
"""Columns where nobody looks: no line is wrapped or cut, so that grep and awk see all of it."""
COMPLETION_TIMEOUT_S = 1.0


@dataclass(slots=True)
class Session:
    """One run of l40sctl. stdout (``out``) is data, stderr (``err``) is talk."""

    socket: str = ""
    output: str = "table"
    out: Console = field(default_factory=lambda: console(sys.stdout))
    err: Console = field(default_factory=lambda: console(sys.stderr))

    @property
    def client(self) -> Client:
        """A client of the chosen socket."""
        return Client(socket_path(self.socket, os.environ))

    @property
    def is_json(self) -> bool:
        """The reader is a program."""
        return self.output == "json"

    @property
    def is_asking(self) -> bool:
        """A person is there who can be asked: nothing is piped, and no program reads."""
        return not self.is_json and sys.stdin.isatty() and self.err.is_terminal

    def show(self, value: Any, view: RenderableType) -> None:
        """Print data: ``value`` as one line of JSON for a program, ``view`` for a person."""
        if self.is_json:
            self.data(encode(value))
        else:
            self.out.print(view)

    def data(self, data: bytes) -> None:
        """Print one line of JSON, or other bytes that are to reach stdout unchanged."""
        click.echo(data, nl=not data.endswith(b"\n"))

    def say(self, text: str, style: str = "") -> None:
        """Tell the person at the terminal something that is not data."""
        self.err.print(text, style=style, markup=False)


def console(stream: TextIO) -> Console:
    """Return a console for ``stream``: colour only on a terminal and without NO_COLOR; full width when piped.

    With $L40SCTL_SVG=FILE (for pictures) stdout is drawn as on a terminal and kept; see ``save_picture``.
    """
    picture = bool(os.environ.get("L40SCTL_SVG")) and stream is sys.stdout
    if picture:
        return _Console(file=stream, record=True, force_terminal=True, color_system="truecolor", highlight=False)
    plain = bool(os.environ.get("NO_COLOR")) or not stream.isatty()
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPED_WIDTH
    return _Console(file=stream, color_system=None if plain else "auto", highlight=False, width=width, emoji=False)


class _Console(Console):
    """A console that leaves it to ``run`` what becomes of a command whose output nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Pass the error on; called while it is handled."""
        raise  # what rich is handling when it calls this


def save_picture(session: Session, title: str) -> None:
    """Write what stdout showed as an SVG to $L40SCTL_SVG, where that is set."""
    if path := os.environ.get("L40SCTL_SVG"):
        session.out.save_svg(path, title=title)


class OutputLost(Exception):  # noqa: N818  it reads as what it says
    """What a command wrote has not arrived; ``why`` is the system's word. Click would end the program at an OSError."""

    def __init__(self, why: OSError) -> None:
        super().__init__(str(why))
        self.why = why


def common(function: F) -> F:
    """Give a command ``-o`` and ``--socket``; they may stand before or after the command's name."""

    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except OSError as error:
            raise OutputLost(error) from error

    output = click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        expose_value=False,
        callback=_set("output"),
        help="For people or for programs. [default: table]",
    )
    socket = click.option(
        "--socket",
        metavar="PATH",
        expose_value=False,
        callback=_set("socket"),
        help="Control socket. [default: $L40SD_SOCKET, else /run/l40sd/control.sock]",
    )
    return output(socket(cast(F, command)))


def _set(name: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
    def store(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            setattr(context.ensure_object(Session), name, value)

    return store


def exit_code_of(error: L40sError) -> int:
    """Return the exit status that stands for an error."""
    return {UNREACHABLE: EXIT_UNREACHABLE, "unknown_worker": EXIT_NO_WORKER}.get(error.code, EXIT_FAILED)


def show_error(session: Session, error: L40sError) -> None:
    """Print an error on stderr: what, where and a hint; as JSON for a program."""
    if session.is_json:
        body = ErrorBody(code=error.code, what=error.what, where=error.where, hint=error.hint)
        click.echo(encode({"error": body}), err=True)
        return
    head, *rest = str(error).split("\n")
    session.err.print("l40sctl: ", style="bold red", end="")
    session.err.print(head, markup=False)
    for line in rest:
        session.err.print(line, style="cyan" if line.startswith("  hint: ") else "", markup=False)


def known_workers(session: Session, names: Sequence[str]) -> list[WorkerStatus]:
    """Return these workers, in this order.

    Raises:
        L40sError: One or more of them do not exist (code ``unknown_worker``); the hint has the nearest names.
    """
    workers = {worker.id: worker for worker in session.client.get("/v1/workers", tuple[WorkerStatus, ...])}
    missing = [name for name in names if name not in workers]
    if missing:
        raise unknown_worker(missing, list(workers))
    return [workers[name] for name in names]


def unknown_worker(missing: Sequence[str], known: Sequence[str]) -> L40sError:
    """Return the error for names that no worker has."""
    near = dict.fromkeys(m for name in missing for m in difflib.get_close_matches(name, known, n=1, cutoff=0.5))
    if near:
        hint = f"did you mean {', '.join(near)}?"
    else:
        hint = f"there are {', '.join(known)}" if known else "there are no workers at present"
    what = f"no worker {', '.join(missing)}"
    return L40sError(what, hint=hint, code="unknown_worker")


def complete_worker(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the workers' names for the shell's completion; none where the daemon does not answer."""
    taken = {name for value in context.params.values() for name in (value if isinstance(value, tuple) else ())}
    return [
        CompletionItem(worker.id, help=worker.phase)
        for worker in _ask(context, "/v1/workers", tuple[WorkerStatus, ...])
        if worker.id.startswith(incomplete) and worker.id not in taken
    ]


def complete_pattern(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the patterns' names for the shell's completion."""
    return [
        CompletionItem(pattern.name, help=pattern.summary or pattern.problem)
        for pattern in _ask(context, "/v1/patterns", tuple[PatternView, ...])
        if pattern.name.startswith(incomplete)
    ]


def _ask(context: click.Context, path: str, kind: type[tuple[Any, ...]]) -> tuple[Any, ...]:
    path_given = next((c.params.get("socket") for c in (context, context.parent) if c and c.params.get("socket")), None)
    session = context.find_object(Session)
    socket = path_given or (session.socket if session else None)
    try:
        return Client(socket_path(socket, os.environ), timeout_s=COMPLETION_TIMEOUT_S).get(path, kind)
    except L40sError:
        return ()


def leave(code: int) -> NoReturn:
    """End the command with this exit status."""
    raise click.exceptions.Exit(code)
