"""What a worker's process is made of (launch, environment, write-ahead record), and what forbids making it."""

import asyncio
import secrets
import shutil
from pathlib import Path

from l40sd.clock import wall_time_s
from l40sd.codec import plain
from l40sd.config.options import Config
from l40sd.engines import launch as launching
from l40sd.engines.launch import Launch
from l40sd.errors import L40sError
from l40sd.model import InstanceId, ModelFacts, Placement
from l40sd.shim import leftovers
from l40sd.workers import cache_folders
from l40sd.workers.context import WorkerContext
from l40sd.workers.process import InstanceSpec
from l40sd.workers.slot import Wanted

TEMPORARY_PATH_LIMIT = 60
"""Engines make sockets in it and call them by UUIDs, 36 characters; a socket's path has at most 107."""


def launch_of(
    placement: Placement, config: Config, context: WorkerContext, *, port: int = 0, api_key: str = ""
) -> Launch:
    """Return exactly what is run.

    Raises:
        L40sError: An engine, a placeholder or a shape that the engine cannot run.
    """
    inventory, python = context.host.inventory, context.python
    return launching.build(placement, config, inventory, port=port, api_key=api_key, python=python)


def refuse_misconfigured(wanted: Wanted, config: Config, context: WorkerContext) -> None:
    """Refuse what no try can mend.

    Raises:
        L40sError: With code ``misconfigured``: the program or the checkpoint is not there.
    """
    model = config.models[wanted.placement.model]
    where = f"models.{model.name}"
    if context.models.facts.get(model.name, ModelFacts()).missing:
        raise L40sError(
            f"there is no checkpoint at {model.source}",
            where=where,
            hint="correct source, then `l40sctl reload`",
            code="misconfigured",
        )
    launch = launch_of(wanted.placement, config, context)
    path = environment_of(launch, context).get("PATH")
    for program in (launch.argv[0], launching.program_of(launch)):
        if shutil.which(program, path=path) is None:
            raise L40sError(
                f"there is no program {program!r} to run it with",
                where=where,
                hint="install it, or give its full path in command = [...] of its [engines] entry",
                code="misconfigured",
            )


async def with_cache(launch: Launch, config: Config, context: WorkerContext) -> Launch:
    """Return the launch with the folder in place for what its engine compiles; without one where there can be none."""
    if not launch.cache:
        return launch
    in_use = {str(meta["cache"]) for meta in context.processes.metas() if meta.get("cache")}
    why = await asyncio.to_thread(
        cache_folders.prepare,
        Path(launch.cache),
        limit_bytes=config.workers.cache_limit_bytes,
        in_use={Path(each).name for each in in_use},
        now_s=wall_time_s(),
    )
    if not why:
        return launch
    context.log.warning("worker.no_cache", worker=launch.worker, reason=why)
    return launching.without_cache(launch)


def spec_of(launch: Launch, wanted: Wanted, config: Config, context: WorkerContext) -> InstanceSpec:
    """Return the write-ahead record; ``meta`` is what the next daemon needs to adopt the process."""
    worker, workers = wanted.placement.worker, config.workers
    run, env = secrets.token_hex(5), environment_of(launch, context)
    return InstanceSpec(
        instance=InstanceId(f"{worker}-{run}"),
        worker=worker,
        argv=launch.argv,
        env=env,
        tmp=temporary_folder(env.get("TMPDIR", "/tmp"), run),
        term_to=launch.term_to,
        term_timeout_s=launch.term_timeout_s,
        orphan_grace_s=config.daemon.orphan_grace_s,
        log_file_bytes=workers.log_file_bytes,
        log_files=workers.log_files,
        pids_limit=workers.pids_limit,
        meta={
            "port": launch.port,
            "api_key": launch.api_key,
            "fingerprint": wanted.fingerprint,
            "cache": launch.cache,
            "placement": plain(wanted.placement),
        },
    )


def temporary_folder(place: str, run: str) -> str:
    """Return the folder that one run gets below the usual one; empty where its sockets' paths would be too long."""
    path = f"{place.rstrip('/')}/{leftovers.FOLDER}{run}"
    return path if len(path) <= TEMPORARY_PATH_LIMIT else ""


def environment_of(launch: Launch, context: WorkerContext) -> dict[str, str]:
    """Return the whole environment: ours in small part, the launch's laid over it; an empty value removes one."""
    merged = {**context.base_env, **launch.env}
    return {name: value for name, value in merged.items() if value}
