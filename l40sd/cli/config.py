"""`l40sctl config`: check a file without a daemon, show what is in force, show what a reload would change."""

import asyncio
import os
from collections.abc import Mapping

import click

from l40sd.cli.session import Session, common
from l40sd.codec import encode
from l40sd.config import files as config_files
from l40sd.config.load import load
from l40sd.config.options import Config
from l40sd.control import preflight
from l40sd.hardware.host import Host
from l40sd.model import Inventory, ModelFacts, ModelName


@click.group(no_args_is_help=True)
def config() -> None:
    """Check, show or compare the configuration."""


@config.command()
@click.argument("file", required=False)
@common
@click.pass_obj
def check(session: Session, file: str | None) -> None:
    """Check FILE and the conf.d beside it, without a daemon; tell every problem at once.

    What a start would refuse or fail with is a problem, too: a key file or a recorded host that is not there, a
    checkpoint's path without a checkpoint, a pattern that does not fit. Patterns are placed on the recorded host or on
    this machine's GPUs.

    Without FILE: $L40SD_CONFIG, else /etc/l40sd/l40sd.toml.
    """
    path = config_files.find(file, os.environ)
    loaded = load(config_files.read(path))
    preflight.refuse_unusable(loaded)
    inventory, facts = asyncio.run(_this_machine(loaded.config))
    preflight.refuse_failing(loaded, facts, inventory if inventory.gpus else None)
    if session.is_json:
        session.data(encode({"files": loaded.files, "models": list(loaded.config.models)}))
        return
    models, patterns = len(loaded.config.models), len(loaded.config.patterns)
    files = f" with {len(loaded.files) - 1} more from conf.d" if len(loaded.files) > 1 else ""
    session.out.print(
        f"{path}{files}: [green]good[/]: {_count(models, 'model')}, {_count(patterns, 'pattern')} of its own"
    )
    if not inventory.gpus:
        session.say(
            "no GPU here: whether its patterns fit, `l40sctl topology --from HOST --pattern NAME --config FILE`"
        )


async def _this_machine(config: Config) -> tuple[Inventory, Mapping[ModelName, ModelFacts]]:
    """Return the host that the configuration names, without GPUs where there are none, and the models' checkpoints."""
    host = await Host.open(config.host)
    try:
        return host.inventory, await host.facts(config)
    finally:
        await host.close()


@config.command()
@common
@click.pass_obj
def show(session: Session) -> None:
    """Print the configuration in force as TOML, with the file of each value; keys and tokens stay hidden."""
    reply = session.client.get("/v1/config", dict[str, object])
    if session.is_json:
        session.data(encode(reply))
    else:
        click.echo(str(reply.get("toml", "")), nl=False)


@config.command()
@common
@click.pass_obj
def diff(session: Session) -> None:
    """Say what a reload would change."""
    reply = session.client.get("/v1/config/diff", dict[str, str])
    if session.is_json:
        session.data(encode(reply))
    elif text := reply.get("diff", ""):
        click.echo(text)
    else:
        session.say("the files say what is in force")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
