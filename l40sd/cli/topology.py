"""`l40sctl topology`: the daemon's host, or any recorded one, with or without a daemon."""

import sys
from collections.abc import Mapping
from pathlib import Path

import click

from l40sd.cli.layout import topology_view
from l40sd.cli.session import Session, common, complete_pattern
from l40sd.config import files as config_files
from l40sd.config.load import load
from l40sd.config.options import Config, HostConfig, ModelConfig
from l40sd.control import views
from l40sd.control.messages import Topology
from l40sd.errors import L40sError
from l40sd.hardware.host_file import parse_host_file
from l40sd.hardware.host_files import SIZE_LIMIT_BYTES, read_host
from l40sd.model import Inventory, ModelFacts, ModelName
from l40sd.placement.patterns import patterns_of
from l40sd.placement.place import place
from l40sd.sizing.model_files import read_model_facts


@click.command()
@click.option("--record", "record_to", metavar="FILE", help="Write the host as a host file; - is stdout.")
@click.option(
    "--from",
    "read_from",
    metavar="HOST",
    help="Show a bundled host, a host file or a pasted `nvidia-smi topo -m`; - is stdin.",
)
@click.option("--pattern", shell_complete=complete_pattern, help="With --from: place this pattern.")
@click.option(
    "--config", "config_file", metavar="FILE", help="With --pattern: take models and patterns from this configuration."
)
@click.option("--short", is_flag=True, help="Only which GPUs share a PCIe switch and a NUMA node.")
@click.option("--force", is_flag=True, help="With --pattern: allow GPU groups that cross sockets.")
@common
@click.pass_obj
def topology(
    session: Session,
    *,
    record_to: str | None,
    read_from: str | None,
    pattern: str | None,
    config_file: str | None,
    force: bool,
    short: bool,
) -> None:
    """Show how the GPUs are linked, and the GPU groups.

    With --from no daemon is asked: try a pattern on a machine before you have it. Without --config A, B, C and D are
    placed for a model that fits anywhere.
    """
    if read_from is None and (pattern or force or config_file):
        raise click.UsageError("--pattern, --config and --force go with --from; see also: l40sctl patterns")
    if pattern is None and (force or config_file):
        raise click.UsageError("--config and --force go with --pattern")
    if read_from is None:
        found = session.client.get("/v1/topology", Topology)
    else:
        found = _local(read_from, pattern, config_file, force=force)
    if record_to is None:
        session.show(found, topology_view(found, is_short=short))
    elif record_to == "-":
        session.data(found.record.encode())
    else:
        _write(record_to, found.record)
        session.say(f"{record_to}: {len(found.gpus)} GPUs recorded", "green")


def _local(host: str, pattern: str | None, config_file: str | None, *, force: bool) -> Topology:
    """Return the topology of a recorded host, with a pattern placed on it.

    Raises:
        L40sError: There is no such host, the configuration is bad, the pattern is unknown or does not fit.
    """
    inventory = parse_host_file(_stdin(), source="stdin") if host == "-" else read_host(host, where="--from")
    if pattern is None:
        return views.topology(inventory)
    if config_file is None:
        model = ModelName("model")
        config = Config(host=HostConfig(), models={model: ModelConfig(name=model, engine="simulated")})
        return _placed(inventory, pattern, config, {}, force=force)
    config = load(config_files.read(Path(config_file))).config
    facts = {model.name: read_model_facts(model.source) for model in config.models.values() if model.source}
    return _placed(inventory, pattern, config, facts, force=force)


def _placed(
    inventory: Inventory, name: str, config: Config, facts: Mapping[ModelName, ModelFacts], *, force: bool
) -> Topology:
    patterns = patterns_of(config, inventory)
    if name not in patterns:
        hint = f"there are {', '.join(patterns)}"
        raise L40sError(f'no pattern "{name}"', hint=hint, code="unknown_pattern")
    layout = place(patterns[name], config, inventory, facts=facts, force=force)
    return views.topology(
        inventory,
        pattern=name,
        groups=views.groups(layout, config, inventory),
        leftover=layout.leftover,
        warnings=layout.warnings,
    )


def _stdin() -> str:
    try:
        data = sys.stdin.buffer.read(SIZE_LIMIT_BYTES + 1)
    except (OSError, AttributeError) as error:  # AttributeError: started without a stdin
        raise L40sError("cannot be read", where="stdin", code="unreadable") from error
    if len(data) > SIZE_LIMIT_BYTES:
        raise L40sError("too large for a host file", where="stdin", code="unreadable")
    return data.decode("utf-8-sig", errors="replace")


def _write(target: str, text: str) -> None:
    try:
        Path(target).write_text(text)
    except OSError as error:
        raise L40sError(f"cannot be written: {error.strerror}", where=target, code="unwritable") from error
