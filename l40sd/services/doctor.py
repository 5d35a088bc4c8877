"""`l40sctl doctor`: what an operator would check by hand, each with what was found and how to mend it."""

import asyncio
import os
import resource
import shutil
from pathlib import Path

from l40sd.core.config import Config
from l40sd.core.descriptors import needed
from l40sd.core.errors import L40sError
from l40sd.core.launch import build, program_of
from l40sd.core.messages import Check
from l40sd.core.naming import natural
from l40sd.services.host import Host
from l40sd.services.supervisor import Supervisor

OK, WARNING, FAILED = "ok", "warning", "failed"
DESCRIPTORS_EXPECTED = 65536
DISK_FREE_AT_LEAST = 0.05
GIB = 1 << 30


async def examine(supervisor: Supervisor, config: Config) -> list[Check]:
    """Return every check, in the order in which they matter."""
    memory = await supervisor.tools.host.memory()
    disks = await asyncio.to_thread(_disks, config)
    return [
        _host(supervisor, answers=memory is not None),
        _provider(supervisor),
        *_programs(supervisor, config),
        _numactl(supervisor, config),
        _links(supervisor),
        _descriptors(config),
        *disks,
        _failed_workers(supervisor),
    ]


def _host(supervisor: Supervisor, *, answers: bool) -> Check:
    host = supervisor.tools.host
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
    processes = supervisor.tools.processes
    state = WARNING if processes.provider == "none" else OK
    hint = "install the units (scripts/install), or give the daemon a cgroup2 of its own" if state == WARNING else ""
    return Check(name="provider", state=state, found=f"{processes.provider}: {processes.note}", hint=hint)


def _programs(supervisor: Supervisor, config: Config) -> list[Check]:
    """One line a model in the pattern: is its engine's program there, is its checkpoint?"""
    checks: dict[str, Check] = {}
    for placement in supervisor.want.layout.placements:
        if placement.endpoint or placement.model in checks:
            continue
        name = f"model {placement.model}"
        try:
            program = program_of(build(placement, config, supervisor.tools.host.inventory, port=0, api_key=""))
        except L40sError as error:
            checks[placement.model] = Check(name=name, state=FAILED, found=error.what, hint=error.hint)
            continue
        path = shutil.which(program)
        facts = supervisor.tools.facts.get(placement.model)
        if path is None:
            hint = f"install it, or set command = [...] in [engines.{config.models[placement.model].engine}]"
            checks[placement.model] = Check(name=name, state=FAILED, found=f"no program {program!r}", hint=hint)
        elif facts is not None and facts.missing:
            source = config.models[placement.model].source
            checks[placement.model] = Check(
                name=name,
                state=FAILED,
                found=f"nothing at {source}",
                hint=f"correct source in [models.{placement.model}]",
            )
        else:
            size = f", checkpoint {facts.size_bytes / GIB:.1f} GiB" if facts and facts.size_bytes else ""
            checks[placement.model] = Check(name=name, state=OK, found=f"{path}{size}")
    return list(checks.values())


def _numactl(supervisor: Supervisor, config: Config) -> Check:
    if not supervisor.tools.host.inventory.is_live:
        return Check(name="pinning", state=OK, found="shown, not applied: the host is read from a file")
    if not config.host.numa_pinning:
        return Check(name="pinning", state=WARNING, found="switched off", hint="[host] numa_pinning = true")
    path = shutil.which("numactl")
    if path is None:
        return Check(name="pinning", state=FAILED, found="no numactl", hint="apt-get install numactl")
    return Check(name="pinning", state=OK, found=path)


def _links(supervisor: Supervisor) -> Check:
    warnings = supervisor.want.layout.warnings
    if warnings:
        return Check(name="placement", state=WARNING, found="; ".join(warnings), hint="l40sctl topology")
    return Check(name="placement", state=OK, found=f"pattern {supervisor.want.pattern} without reservations")


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


def _disks(config: Config) -> list[Check]:
    checks = []
    for key in ("state_dir", "log_dir"):
        directory = Path(getattr(config.daemon, key))
        usage = shutil.disk_usage(directory)
        found = f"{directory}: {usage.free / GIB:.1f} GiB free"
        if not os.access(directory, os.W_OK):
            checks.append(Check(name=key, state=FAILED, found=f"{directory} is not writable", hint="check its owner"))
        elif usage.free < DISK_FREE_AT_LEAST * usage.total:
            checks.append(Check(name=key, state=WARNING, found=found, hint="free some space"))
        else:
            checks.append(Check(name=key, state=OK, found=found))
    return checks


def _failed_workers(supervisor: Supervisor) -> Check:
    given_up = [w.id for w in supervisor.workers.values() if w.phase in ("failed", "quarantined", "stuck")]
    failed = sorted(given_up, key=natural)
    if failed:
        hint = f"l40sctl status {failed[0]}; l40sctl logs {failed[0]}; then l40sctl reset"
        return Check(name="workers", state=FAILED, found=f"not running: {', '.join(failed)}", hint=hint)
    return Check(name="workers", state=OK, found=f"{len(supervisor.workers)}, none given up")
