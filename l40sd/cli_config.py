"""`l40sctl config`: check a file without a daemon, show what is in force, show what a reload would change."""

import os

import click

from l40sd.adapters import configfiles
from l40sd.cli_base import Session, common
from l40sd.core.configfile import load
from l40sd.core.messages import encode


@click.group(no_args_is_help=True)
def config() -> None:
    """Check, show or compare the configuration."""


@config.command()
@click.argument("file", required=False)
@common
@click.pass_obj
def check(session: Session, file: str | None) -> None:
    """Check FILE and the conf.d beside it, without a daemon; tell every problem at once.

    Without FILE: $L40SD_CONFIG, else /etc/l40sd/l40sd.toml.
    """
    path = configfiles.find(file, os.environ)
    loaded = load(configfiles.read(path))
    if session.is_json:
        session.data(encode({"files": loaded.files, "models": list(loaded.config.models)}))
        return
    models, patterns = len(loaded.config.models), len(loaded.config.patterns)
    files = f" with {len(loaded.files) - 1} more from conf.d" if len(loaded.files) > 1 else ""
    session.out.print(
        f"{path}{files}: [green]good[/]: {_count(models, 'model')}, {_count(patterns, 'pattern')} of its own"
    )


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
