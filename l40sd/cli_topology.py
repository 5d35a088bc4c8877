"""`l40sctl topology`: the daemon's host, or any host file, with or without a daemon."""

import sys
from pathlib import Path

import click

from l40sd.cli_base import Session, common, complete_pattern
from l40sd.cli_layout import topology_view
from l40sd.core import views
from l40sd.core.config import Config, HostConfig, ModelConfig
from l40sd.core.errors import L40sError
from l40sd.core.hostfile import parse_host_file
from l40sd.core.messages import Topology
from l40sd.core.model import Inventory, ModelName
from l40sd.core.pattern import patterns_of
from l40sd.core.placement import place

FILE_LIMIT_BYTES = 1 << 22


@click.command()
@click.option("--record", "record_to", metavar="FILE", help="Write the host as a host file; - is stdout.")
@click.option(
    "--from", "read_from", metavar="FILE", help="Show a host file or a pasted `nvidia-smi topo -m`; - is stdin."
)
@click.option("--pattern", shell_complete=complete_pattern, help="With --from: place this pattern (A, B, C or D).")
@click.option("--force", is_flag=True, help="With --pattern: allow GPU groups that cross sockets.")
@common
@click.pass_obj
def topology(
    session: Session, *, record_to: str | None, read_from: str | None, pattern: str | None, force: bool
) -> None:
    """Show how the GPUs are linked, and the GPU groups.

    With --from no daemon is asked: try a pattern on a machine before you have it.
    """
    if read_from is None and (pattern or force):
        raise click.UsageError("--pattern and --force go with --from; see also: l40sctl patterns")
    found = (
        session.client.get("/v1/topology", Topology) if read_from is None else _local(read_from, pattern, force=force)
    )
    if record_to is None:
        session.show(found, topology_view(found))
    elif record_to == "-":
        session.data(found.record.encode())
    else:
        _write(record_to, found.record)
        session.say(f"{record_to}: {len(found.gpus)} GPUs recorded", "green")


def _local(source: str, pattern: str | None, *, force: bool) -> Topology:
    """Return the topology that a file describes, with a pattern for one model placed on it.

    Raises:
        L40sError: The file is unreadable or describes no host; the pattern is unknown or does not fit.
    """
    inventory = parse_host_file(_read(source), source="stdin" if source == "-" else source)
    return views.topology(inventory) if pattern is None else _placed(inventory, pattern, force=force)


def _placed(inventory: Inventory, name: str, *, force: bool) -> Topology:
    model = ModelName("model")
    config = Config(host=HostConfig(), models={model: ModelConfig(name=model, engine="simulated")})
    patterns = patterns_of(config, inventory)
    if name not in patterns:
        raise L40sError(f'no pattern "{name}"', hint=f"there are {', '.join(patterns)}", code="unknown_pattern")
    layout = place(patterns[name], config, inventory, facts={}, force=force)
    return views.topology(
        inventory,
        pattern=name,
        groups=views.groups(layout, config, inventory),
        leftover=layout.leftover,
        warnings=layout.warnings,
    )


def _read(source: str) -> str:
    try:
        with sys.stdin.buffer if source == "-" else Path(source).open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise L40sError(f"cannot be read: {error.strerror}", where=source, code="unreadable") from error
    if len(data) > FILE_LIMIT_BYTES:
        raise L40sError("too large for a host file", where=source, code="unreadable")
    return data.decode(errors="replace")


def _write(target: str, text: str) -> None:
    try:
        Path(target).write_text(text)
    except OSError as error:
        raise L40sError(f"cannot be written: {error.strerror}", where=target, code="unwritable") from error
