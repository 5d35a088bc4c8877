"""`l40sctl switch-pattern` and `l40sctl restart`: what changes the workers step by step."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import click

from l40sd.cli.layout import preview_view, warnings_of
from l40sd.cli.session import EXIT_FAILED, Session, common, complete_pattern, complete_worker, leave, unknown_worker
from l40sd.cli.wait import begin
from l40sd.codec import encode
from l40sd.control.client import worker_path
from l40sd.control.messages import Accepted, ChangePreview, PatternRequest, RestartRequest, WorkerStatus
from l40sd.errors import L40sError


@click.command("switch-pattern")
@click.argument("name", shell_complete=complete_pattern)
@click.option("--dry-run", is_flag=True, help="Show each GPU before and after, the order, capacity and times.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask when a model leaves service, or a change is replaced.")
@click.option("--no-wait", is_flag=True, help="Print the operation's id and leave; see `l40sctl wait`.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Stop watching after S seconds.")
@click.option("--force", is_flag=True, help="Allow GPU groups that cross sockets.")
@common
@click.pass_obj
def switch_pattern(
    session: Session, name: str, *, dry_run: bool, yes: bool, no_wait: bool, timeout_s: float | None, force: bool
) -> None:
    """Change the host to pattern NAME while it serves.

    On a terminal it asks first when a model leaves service or somebody else's change is replaced. Ctrl-C, --timeout
    and --no-wait leave the change running. Ends with 0 when the pattern is in force, and with 1 when it went back to
    the old one or is in place but for some workers.
    """
    wish = PatternRequest(name=name, dry_run=dry_run, force=force)
    if dry_run:
        preview = session.client.ask("/v1/pattern", wish, ChangePreview)
        session.show(preview, preview_view(preview))
        return
    if session.is_asking and not yes:
        _ask(session, PatternRequest(name=name, dry_run=True, force=force))
    accepted = session.client.ask("/v1/pattern", wish, Accepted)
    begin(session, accepted, no_wait=no_wait, timeout_s=timeout_s, pattern=name)


def _ask(session: Session, wish: PatternRequest) -> None:
    """Have the person at the terminal confirm what others would notice; leave when they do not."""
    warnings = warnings_of(session.client.ask("/v1/pattern", wish, ChangePreview))
    for line in warnings:
        session.say(f"! {line}", "bold yellow")
    if warnings and not click.confirm(f"Change to pattern {wish.name}?", err=True):
        session.say("nothing is changed")
        leave(EXIT_FAILED)


@click.command()
@click.argument("workers", nargs=-1, metavar="[WORKER...]", shell_complete=complete_worker)
@click.option("--all", "is_all", is_flag=True, help="Every worker.")
@click.option("--model", metavar="NAME", help="Every worker of this model.")
@click.option("--now", is_flag=True, help="All at once, whatever capacity is left.")
@click.option("--no-wait", is_flag=True, help="Print the operation's id and leave; see `l40sctl wait`.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="Stop watching after S seconds.")
@common
@click.pass_obj
def restart(
    session: Session,
    workers: tuple[str, ...],
    *,
    is_all: bool,
    model: str | None,
    now: bool,
    no_wait: bool,
    timeout_s: float | None,
) -> None:
    """Drain each WORKER, stop it and start it anew; a drained one stays drained.

    A WORKER may be a pattern for names, e.g. 'llama-*'. Several are restarted one after the other: each model keeps
    min_ready of its ready capacity, and the first that does not come back ends it. One alone is told at once.
    """
    if not workers and not is_all and model is None:
        raise click.UsageError("Name a WORKER, or say --all or --model.")
    chosen = _chosen(session, workers, is_all=is_all, model=model)
    if len(chosen) == 1 or now:
        _restart_now(session, chosen)
        return
    accepted = session.client.ask("/v1/restart", RestartRequest(workers=chosen), Accepted)
    begin(session, accepted, no_wait=no_wait, timeout_s=timeout_s)


def _restart_now(session: Session, chosen: Sequence[str]) -> None:
    for name in chosen:
        session.client.post(worker_path(name, "restart"))
        if not session.is_json:
            session.say(f"{name}: drains, then starts anew")
    if session.is_json:
        session.data(encode({"workers": chosen}))


def _chosen(session: Session, names: Sequence[str], *, is_all: bool, model: str | None) -> tuple[str, ...]:
    """Return the workers meant, each once, in the daemon's order.

    Raises:
        L40sError: A name that no worker has, a pattern that fits none, or a model without a worker.
    """
    known = session.client.get("/v1/workers", tuple[WorkerStatus, ...])
    missing = [name for name in names if not any(fnmatchcase(worker.id, name) for worker in known)]
    if missing:
        raise unknown_worker(missing, [worker.id for worker in known])
    chosen = tuple(
        worker.id
        for worker in known
        if is_all or worker.model == model or any(fnmatchcase(worker.id, name) for name in names)
    )
    if not chosen:
        models = ", ".join(sorted({worker.model for worker in known})) or "none"
        raise L40sError(f"no worker of model {model!r}", hint=f"models with workers: {models}", code="unknown_worker")
    return chosen
