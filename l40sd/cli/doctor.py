"""`l40sctl doctor`: the daemon's own checks, and where it does not answer what can be found out without it."""

import asyncio
import os

import click

from l40sd.cli.session import EXIT_FAILED, Session, common, exit_code_of, leave
from l40sd.cli.status import checks_view
from l40sd.config import files as config_files
from l40sd.config.load import Loaded
from l40sd.control import preflight
from l40sd.control.client import UNREACHABLE
from l40sd.control.messages import Check
from l40sd.control.preflight import FAILED, OK, WARNING
from l40sd.errors import L40sError
from l40sd.hardware.host import Host
from l40sd.placement.patterns import patterns_of
from l40sd.placement.place import place
from l40sd.systemd import last_error, unit_facts

UNIT = "l40sd.service"


@click.command()
@click.option("--config", "config_path", metavar="FILE", help="Without a daemon: its configuration.")
@common
@click.pass_obj
def doctor(session: Session, config_path: str | None) -> None:
    """Check what an operator would check by hand, with a daemon or without.

    Ends with 1 when something failed, with 5 when the daemon does not answer.
    """
    try:
        checks = session.client.get("/v1/doctor", tuple[Check, ...])
    except L40sError as error:
        if error.code != UNREACHABLE:
            raise
        silent = Check(name="daemon", state=FAILED, found=f"{error.where}: {error.what}", hint=error.hint)
        found = (silent, *asyncio.run(_without_daemon(config_path)))
        session.show(found, checks_view(found))
        leave(exit_code_of(error))
    checks = (Check(name="daemon", state=OK, found=f"answers on {session.client.path}"), *checks)
    session.show(checks, checks_view(checks))
    if any(check.state == FAILED for check in checks):
        leave(EXIT_FAILED)


async def _without_daemon(config_path: str | None) -> list[Check]:
    """Return the unit's state and its last error, then what a start would find, as far as the configuration goes."""
    path = config_files.find(config_path, os.environ)
    loaded, checks = await asyncio.to_thread(preflight.config_on_disk, path)
    return [*await _unit(), *checks, *(await _start(loaded) if loaded is not None else [])]


async def _unit() -> list[Check]:
    """Say what systemd has to tell; nothing where the unit is not installed."""
    facts = await unit_facts(UNIT)
    if facts.get("LoadState") != "loaded":
        return []
    state = facts.get("ActiveState", "")
    found = f"{UNIT} is {state} ({facts.get('SubState', '')})"
    if facts.get("Result", "success") != "success":
        found += f": {facts['Result']}, exit status {facts.get('ExecMainStatus', '?')}"
    found += f", restarted {facts['NRestarts']} times" if facts.get("NRestarts", "0") != "0" else ""
    hint = {"inactive": "systemctl start l40sd", "failed": "mend what is named below, then: systemctl start l40sd"}
    checks = [Check(name="unit", state=FAILED if state == "failed" else WARNING, found=found, hint=hint.get(state, ""))]
    if error := await last_error(UNIT):
        checks.append(Check(name="journal", state=WARNING, found=error, hint=f"journalctl -u {UNIT} -n 50"))
    return checks


async def _start(loaded: Loaded) -> list[Check]:
    """Return what a start with this configuration would find on this machine."""
    config = loaded.config
    host = await Host.open(config.host)
    try:
        await host.adopt(preflight.known_gpus(config), held=())
        facts, memory = await host.facts(config), await host.memory()
    finally:
        await host.close()
    inventory = host.inventory
    found = f"{len(inventory.gpus)} GPUs, {len(inventory.numa_nodes)} NUMA nodes, from {inventory.source}"
    if not inventory.gpus:
        seen = Check(name="host", state=FAILED, found=host.degraded[0], hint="try nvidia-smi; dmesg")
    elif missing := host.degraded:
        state = FAILED if host.lost else WARNING
        seen = Check(name="host", state=state, found=f"{found}; {'; '.join(missing)}", hint="nvidia-smi; dmesg (Xid)")
    else:
        state = OK if inventory.is_live and memory is not None else WARNING
        hint = "" if inventory.is_live else 'a host file: set [host] inventory = "auto"'
        seen = Check(name="host", state=state, found=found, hint=hint)
    checks = [*preflight.key_file(config), preflight.exposure(config), *preflight.endpoint_without_daemon(config), seen]
    if inventory.gpus:
        try:
            layout = place(patterns_of(config, inventory)[config.daemon.pattern], config, inventory, facts=facts)
        except L40sError as error:
            checks.append(Check(name="placement", state=FAILED, found=error.what, hint=error.hint))
        else:
            checks += preflight.programs(layout, config, inventory, facts)
            checks.append(preflight.placement(layout.pattern, layout.warnings))
    checks.append(preflight.numactl(inventory, config))
    return [*checks, *preflight.directories(config, ("state_dir", "runtime_dir", "log_dir"))]
