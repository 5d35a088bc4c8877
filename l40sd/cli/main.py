"""`l40sctl`: the operator's command line. Talks to the daemon's control socket and to nothing else.

Exit status: 0 done; 1 failed; 2 misuse; 3 `status WORKER`: not serving; 4 no such worker; 5 daemon not reachable;
130 Ctrl-C; 141 whoever read the output has gone (`l40sctl events | head -1`).
"""

import errno
import sys
import time
from collections.abc import Sequence

import click
from click.shell_completion import get_completion_class
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from l40sd import __version__
from l40sd.cli.change import restart, switch_pattern
from l40sd.cli.config import config
from l40sd.cli.doctor import doctor
from l40sd.cli.follow import events, logs
from l40sd.cli.grid import Window
from l40sd.cli.layout import patterns_view
from l40sd.cli.session import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NO_READER,
    EXIT_NOT_SERVING,
    OutputLost,
    Session,
    common,
    complete_worker,
    exit_code_of,
    known_workers,
    leave,
    save_picture,
    show_error,
)
from l40sd.cli.status import status_view, worker_view
from l40sd.cli.topology import topology
from l40sd.cli.wait import wait
from l40sd.codec import encode
from l40sd.control.client import UNREACHABLE, worker_path
from l40sd.control.messages import PatternView, Status
from l40sd.errors import L40sError
from l40sd.streams import NO_READER, abandon, settle

PROGRAM = "l40sctl"
WATCH_TERMINAL_S = 0.5
WATCH_PIPED_S = 2.0
UPGRADE_LIMIT_S = 60.0


def main() -> None:
    """Run l40sctl and end with its exit status."""
    settle()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; return its exit status.

    Everything that a command reads or asks turns its errors into ours; an OSError that is left is of the output.
    """
    session = Session()
    try:
        code = cli.main(args=list(arguments), prog_name=PROGRAM, obj=session, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):  # as the version of click likes it
        return EXIT_INTERRUPTED
    except L40sError as error:
        show_error(session, error)
        return exit_code_of(error)
    except OutputLost as lost:
        return _output_lost(lost.why)
    except OSError as error:
        return _output_lost(error)
    save_picture(session, f"{PROGRAM} {' '.join(arguments)}")
    return code if isinstance(code, int) else 0


def _output_lost(error: OSError) -> int:
    """Return the exit status for output that could not be written, after saying so where anybody would hear it."""
    abandon(sys.stdout)
    if error.errno in NO_READER:  # of his own will: he has seen enough
        return EXIT_NO_READER
    try:
        why = "stdout is closed" if error.errno == errno.EBADF else error.strerror or str(error)
        sys.stderr.write(f"{PROGRAM}: the output cannot be written: {why}\n")
        sys.stderr.flush()
    except OSError:  # a full disk behind both
        abandon(sys.stderr)
    return EXIT_FAILED


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@common
def cli() -> None:
    """Watch and steer l40sd, the daemon that runs this host's inference workers."""


cli.add_command(switch_pattern)
cli.add_command(wait)
cli.add_command(restart)
cli.add_command(topology)
cli.add_command(config)
cli.add_command(doctor)
cli.add_command(events)
cli.add_command(logs)


@cli.command()
@click.argument("worker", required=False, shell_complete=complete_worker)
@click.option("--watch", "-w", is_flag=True, help="Go on until Ctrl-C.")
@common
@click.pass_obj
def status(session: Session, worker: str | None, *, watch: bool) -> None:
    """Show pattern, workers, GPUs and endpoint, or one WORKER.

    With WORKER the exit status is 3 when it is not serving.
    """
    if watch:
        _watch(session, worker)
    elif worker is None:
        found = session.client.get("/v1/status", Status)
        session.show(found, status_view(found))
    else:
        [one] = known_workers(session, [worker])
        session.show(one, worker_view(one))
        if one.phase != "ready":
            leave(EXIT_NOT_SERVING)


def _watch(session: Session, worker: str | None) -> None:
    """Show the status again and again; a daemon that goes away meanwhile is waited for."""
    last = _glance(session, worker)  # not reachable from the start: exit 5
    try:
        if session.is_json or not session.out.is_terminal:
            while True:
                session.show(last[0], Group(last[1], Text("")))
                time.sleep(WATCH_PIPED_S)
                last = _glance(session, worker)
        with Live(Window(last[1]), console=session.out, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_TERMINAL_S)
                try:
                    last = _glance(session, worker)
                    live.update(Window(last[1]), refresh=True)
                except L40sError as error:
                    if error.code != UNREACHABLE:
                        raise
                    away = Text(f"! {error.what}; trying again. Last seen:", style="bold red")
                    live.update(Window(Group(away, last[1])), refresh=True)
    except KeyboardInterrupt:
        if session.out.is_terminal and not session.is_json:
            session.out.print(last[1])


def _glance(session: Session, worker: str | None) -> tuple[object, RenderableType]:
    if worker is None:
        found = session.client.get("/v1/status", Status)
        return found, status_view(found)
    [one] = known_workers(session, [worker])
    return one, worker_view(one)


@cli.command()
@common
@click.pass_obj
def patterns(session: Session) -> None:
    """Show what every pattern would be on this host."""
    found = session.client.get("/v1/patterns", tuple[PatternView, ...])
    session.show(found, patterns_view(found))


def _worker_command(verb: str, doing: str, text: str) -> None:
    """Add ``l40sctl VERB WORKER...``: every name is checked before the first worker is touched."""

    def command(session: Session, workers: tuple[str, ...]) -> None:
        known_workers(session, workers)
        for name in workers:
            session.client.post(worker_path(name, verb))
            if not session.is_json:
                session.say(f"{name}: {doing}")
        if session.is_json:
            session.data(encode({"workers": workers}))

    command.__doc__ = text
    argument = click.argument("workers", nargs=-1, required=True, metavar="WORKER...", shell_complete=complete_worker)
    cli.command(verb)(argument(common(click.pass_obj(command))))


_worker_command("drain", "drains", "Send each WORKER no more requests until undrain; it stays up.")
_worker_command("undrain", "receives requests again", "Send each drained WORKER requests again.")
_worker_command(
    "reset", "failures forgotten", "Forget each WORKER's failures; one that waits for another try is started at once."
)


@cli.command()
@common
@click.pass_obj
def version(session: Session) -> None:
    """Show the versions of l40sctl and of the daemon."""
    failure: L40sError | None = None
    daemon: str | None = None
    try:
        daemon = session.client.get("/v1/version", dict[str, str]).get("version")
    except L40sError as error:
        failure = error
    session.show(
        {"client": __version__, "daemon": daemon},
        Text(f"l40sctl {__version__}\nl40sd   {daemon or 'not reachable'}"),
    )
    if failure is not None:
        raise failure


@cli.command()
@click.option("--forget-gpus", is_flag=True, help="GPUs that are missing were removed: do not miss them any more.")
@common
@click.pass_obj
def reload(session: Session, *, forget_gpus: bool) -> None:
    """Make the daemon read its configuration and look at the host's GPUs again.

    A bad configuration changes nothing and is told here. GPUs that came back are taken in, lost ones left out.
    """
    path = "/v1/reload?forget_gpus=1" if forget_gpus else "/v1/reload"
    changed = session.client.post(path).get("changed", [])
    if session.is_json:
        session.data(encode({"changed": changed}))
    else:
        click.echo("\n".join(changed)) if changed else session.say("nothing changed")


@cli.command()
@common
@click.pass_obj
def upgrade(session: Session) -> None:
    """Make the daemon become the version now installed.

    Workers, the endpoint's listener and open connections are kept: streams go on. The new version checks the
    configuration first; if it objects, nothing changes.
    """
    session.client.post("/v1/upgrade")
    before_s = time.monotonic()
    uptime_s = float("inf")
    while time.monotonic() - before_s < UPGRADE_LIMIT_S:  # over when a daemon younger than our request answers
        try:
            uptime_s = session.client.get("/v1/status", Status).uptime_s
        except L40sError as error:
            if error.code != UNREACHABLE:
                raise
        if uptime_s < time.monotonic() - before_s:
            running = session.client.get("/v1/version", dict[str, str])
            session.show(running, Text(f"l40sd {running.get('version', '?')} has taken over"))
            return
        time.sleep(0.2)
    raise L40sError(
        f"no new daemon answered within {UPGRADE_LIMIT_S:g} s",
        hint="see its log: journalctl -u l40sd -n 50",
        code="upgrade_slow",
    )


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    For bash: eval "$(l40sctl completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, PROGRAM, "_L40SCTL_COMPLETE").source())
