"""`l40sctl doctor`: what an operator would check by hand, each with what was found and how to mend it."""

import asyncio
import resource
from pathlib import Path

from l40sd.config import show as config_show
from l40sd.config.options import Config
from l40sd.control import preflight
from l40sd.control.messages import Check
from l40sd.control.preflight import FAILED, OK, WARNING
from l40sd.hardware.host import Host
from l40sd.naming import natural
from l40sd.proxy.descriptors import needed
from l40sd.supervisor.supervisor import Supervisor

DESCRIPTORS_EXPECTED = 65536


async def examine(supervisor: Supervisor, config: Config, path: Path, *, reload_problem: str) -> list[Check]:
    """Return every check, in the order in which they matter.

    Args:
        path: Of the configuration's main file, which may be another than ``config`` by now.
        reload_problem: Why the latest reload was refused; empty when it was not.
    """
    memory = await supervisor.context.host.memory()
    disks = await asyncio.to_thread(preflight.directories, config)
    layout, inventory = supervisor.want.layout, supervisor.context.host.inventory
    return [
        *await asyncio.to_thread(_files, config, path, reload_problem),
        preflight.exposure(config),
        _host(supervisor, answers=memory is not None),
        _provider(supervisor),
        *preflight.programs(layout, config, inventory, supervisor.context.models.facts),
        preflight.numactl(inventory, config),
        _placement(supervisor),
        _descriptors(config),
        *disks,
        _failed_workers(supervisor),
    ]


def _files(config: Config, path: Path, reload_problem: str) -> list[Check]:
    """Look at the configuration on disk: broken, refused by the latest reload, or another than the one in force."""
    loaded, checks = preflight.config_on_disk(path)
    if loaded is None:
        return checks
    if reload_problem:
        hint = "what is in force is older: l40sctl config diff; mend it, then l40sctl reload"
        checks = [
            Check(name="config", state=FAILED, found=f"the latest reload was refused: {reload_problem}", hint=hint)
        ]
    elif changed := config_show.diff(config, loaded.config):
        found = f"{path} is not what is in force: {len(changed)} differences"
        checks = [Check(name="config", state=WARNING, found=found, hint="l40sctl config diff; l40sctl reload")]
    return [*checks, *preflight.key_file(loaded.config)]


def _host(supervisor: Supervisor, *, answers: bool) -> Check:
    host = supervisor.context.host
    inventory = host.inventory
    found = f"{len(inventory.gpus)} GPUs, {len(inventory.numa_nodes)} NUMA nodes, from {inventory.source}"
    if not inventory.is_live:
        return Check(name="host", state=WARNING, found=found, hint='a host file: set [host] inventory = "auto"')
    if missing := [*(f"{gpu.name} is lost: {gpu.reason}" for gpu in host.lost), *_offers(host)]:
        hint = "nvidia-smi; dmesg (Xid). Back: `l40sctl reload`. Removed for good: `l40sctl reload --forget-gpus`"
        return Check(name="host", state=FAILED, found=f"{found}; {'; '.join(missing)}", hint=hint)
    if not inventory.gpus:
        return Check(name="host", state=FAILED, found="; ".join(host.degraded), hint="try nvidia-smi; dmesg")
    if not answers:
        return Check(name="host", state=WARNING, found=f"{found}; NVML does not answer", hint="try nvidia-smi; dmesg")
    return Check(name="host", state=OK, found=found)


def _offers(host: Host) -> list[str]:
    return [f"{name} answers and is not in use" for name in host.offered]


def _provider(supervisor: Supervisor) -> Check:
    processes = supervisor.context.processes
    state = WARNING if processes.provider == "none" else OK
    hint = "install the units (scripts/install), or give the daemon a cgroup2 of its own" if state == WARNING else ""
    return Check(name="provider", state=state, found=f"{processes.provider}: {processes.note}", hint=hint)


def _placement(supervisor: Supervisor) -> Check:
    layout, pattern = supervisor.want.layout, supervisor.want.pattern
    if not layout.placements:
        found = f"nothing of pattern {pattern} is placed"
        return Check(name="placement", state=FAILED, found=found, hint="l40sctl status says why")
    return preflight.placement(pattern, layout.warnings)


def _descriptors(config: Config) -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(DESCRIPTORS_EXPECTED, needed(config.proxy.connection_limit))
    if soft < wanted:
        return Check(
            name="descriptors",
            state=WARNING,
            found=f"{soft} files may be open, {wanted} are needed for proxy.connection_limit",
            hint="LimitNOFILE= in the unit, or `ulimit -n`",
        )
    return Check(name="descriptors", state=OK, found=f"{soft} files may be open")


def _failed_workers(supervisor: Supervisor) -> Check:
    given_up = [w.id for w in supervisor.workers.values() if w.phase in ("failed", "quarantined", "stuck")]
    failed = sorted(given_up, key=natural)
    if failed:
        hint = f"l40sctl status {failed[0]}; l40sctl logs {failed[0]}; then l40sctl reset"
        return Check(name="workers", state=FAILED, found=f"not running: {', '.join(failed)}", hint=hint)
    return Check(name="workers", state=OK, found=f"{len(supervisor.workers)}, none given up")
