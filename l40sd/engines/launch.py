"""Placement and engine -> exactly what is run, and how it is probed and stopped.

A template of engines/table.py or of ``[engines.NAME]`` is filled in with the worker's values. Only an ASCII name in
single braces is a placeholder: ``{"mode": 2}`` and ``{{ messages }}`` are what they look like. ``args`` and ``env``
of ``[models.NAME]`` are passed on letter for letter.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from urllib.parse import urlsplit

from l40sd.config import placeholders
from l40sd.config.options import Config, ModelConfig
from l40sd.engines.caches import folder_of
from l40sd.engines.table import Engine, Probes, TermTo, When, resolve
from l40sd.errors import L40sError
from l40sd.hardware.cpus import format_cpu_list
from l40sd.model import GpuId, Inventory, Link, Placement, WorkerId

__all__ = ["Launch", "Probes", "build", "program_of"]


_BINDINGS = ("--cpunodebind=", "--physcpubind=", "--membind=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One worker's process, ready to be spawned; or, for an external worker, only how to probe it.

    Attributes:
        argv: Whole command line, numactl prefix first where the worker is pinned; empty for external.
        env: Added to a minimal environment (PATH, HOME, LANG); never the daemon's own secrets.
        host: Address the worker listens on.
        port: 0 in a launch that was only built for its fingerprint.
        api_key: Key between proxy and worker; empty where the engine takes none.
        served_name: The model name that the engine answers to.
        ends_streams: As the engine's.
        term_to: Who gets SIGTERM.
        term_timeout_s: From SIGTERM to the kill.
        fingerprint: Same fingerprint, same process: covers argv, env and probes with port and key left out.
        cache: The folder for what the engine compiles, where it is told of one; else empty.
        pinning: What numactl was told, or would be told on a live host; for display.
    """

    worker: WorkerId
    engine: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    api_key: str
    served_name: str
    probes: Probes
    term_timeout_s: float
    fingerprint: str
    pinning: str = ""
    term_to: TermTo = TermTo.ENGINE
    cache: str = ""
    ends_streams: bool = False


def build(
    placement: Placement,
    config: Config,
    inventory: Inventory,
    *,
    port: int,
    api_key: str,
    python: str = "python3",
) -> Launch:
    """Return what one placement runs.

    1. Somebody else runs it (an endpoint is given): only where and how to ask.
    2. numactl's part, applied on the machine's own devices only; then the engine's command, the options whose
       condition holds, the model's own arguments.
    3. Environment, later wins: the group's GPUs and how they may talk, the engine's, that of all workers, what the
       operator says for this engine, the model's.
    4. The fingerprint is taken of the same lines with the port's and the key's placeholders left unfilled and without
       the caches' places, so it is equal for every port, key and place, and after every restart of the daemon.

    Args:
        port: Where the worker will listen; 0 when only the fingerprint is wanted.
        api_key: The worker's key; dropped where the engine has no place for one.
        python: The interpreter that has l40sd, for the simulated engine.

    Raises:
        L40sError: An engine nobody knows, a placeholder nobody knows, or a layout that the engine cannot run.
    """
    model = config.models[placement.model]
    engine = resolve(model.engine, config.engines)
    if placement.endpoint or engine.is_external:
        return _external(placement, model, engine)
    if engine.tp_or_pp and placement.tp > 1 and placement.pp > 1:
        raise L40sError(
            f"{engine.name} splits a model by tensors or by layers, not both; tp = {placement.tp}, pp = {placement.pp}",
            where=f"models.{model.name}",
            hint=f"use tp = {placement.tp * placement.pp} or pp = {placement.tp * placement.pp}",
            code="bad_layout",
        )
    pinning = _pinning(placement, config, inventory)
    shape = _shape(placement, config, inventory)
    takes_key = any("{api_key}" in part for part in (*_template(engine, {When.API_KEY}), *engine.env.values()))

    def lines(port_text: str, key: str, *, caching: bool) -> tuple[tuple[str, ...], dict[str, str]]:
        conditions = shape | ({When.API_KEY} if key else set())
        values = _values(placement, config, model, port_text, key, python)
        where = f"engines.{engine.name}"
        argv = _fill_all(_template(engine, conditions), values, f"{where}.command")
        env = {
            **_gpu_env(placement, config),
            **{
                name: _fill(text, values, f"{where}.env.{name}")
                for name, text in engine.env.items()
                if (key or "{api_key}" not in text) and (caching or "{cache}" not in text)
            },
            **_everywhere(config, engine),
            **model.env,
        }
        prefix = pinning if inventory.is_live else ()
        return (*prefix, *argv, *model.args), {name: value for name, value in env.items() if value}

    caching = config.workers.cache_limit_bytes > 0
    argv, env = lines(str(port), api_key if takes_key else "", caching=caching)
    unfilled = lines("{port}", "{api_key}" if takes_key else "", caching=False)
    takes_cache = caching and any("{cache}" in text for text in engine.env.values())
    return Launch(
        worker=placement.worker,
        engine=engine.name,
        argv=argv,
        env=env,
        host=config.workers.host,
        port=port,
        api_key=api_key if takes_key else "",
        served_name=model.name,
        probes=engine.probes,
        term_timeout_s=term_timeout_s(config, engine),
        fingerprint=_fingerprint(*unfilled, engine.probes),
        pinning=" ".join(pinning),
        term_to=engine.term_to,
        cache=folder_of(placement, config) if takes_cache else "",
        ends_streams=engine.ends_streams,
    )


def without_cache(launch: Launch) -> Launch:
    """Return the launch for an engine that keeps what it compiles where it likes."""
    env = {name: value for name, value in launch.env.items() if not value.startswith(f"{launch.cache}/")}
    return replace(launch, env=env, cache="")


def program_of(launch: Launch) -> str:
    """Return the engine's program, behind numactl's part; empty for a worker that somebody else runs."""
    match launch.argv:
        case ("numactl", binding, *rest) if binding.startswith(_BINDINGS):
            return next((part for part in rest if not part.startswith(_BINDINGS)), "")
        case (program, *_):
            return program
        case _:
            return ""


def peer_access_reaches(nccl_p2p: str) -> Link:
    """Return the farthest link over which GPUs may write into each other's memory; ``Link.X``: none.

    Left to itself NCCL goes as far as PXB: through any number of PCIe switches, but not through a host bridge.
    """
    match nccl_p2p:
        case "auto":
            return Link.PXB
        case "off":
            return Link.X
        case level:
            return Link[level]


def _external(placement: Placement, model: ModelConfig, engine: Engine) -> Launch:
    where = f"models.{model.name}.endpoints"
    try:
        address = urlsplit(placement.endpoint)
        host, port = address.hostname or "", address.port or 80
    except ValueError as error:
        raise L40sError(f"{placement.endpoint!r}: {error}", where=where, code="bad_config") from error
    if address.scheme != "http" or not host or address.path not in ("", "/"):
        raise L40sError(
            f"{placement.endpoint!r} is not the address of a worker",
            where=where,
            hint="http://host:port, without a path; https is not spoken to workers",
            code="bad_config",
        )
    return Launch(
        worker=placement.worker,
        engine=engine.name,
        argv=(),
        env={},
        host=host,
        port=port,
        api_key=model.endpoint_key,
        served_name=model.source or model.name,
        probes=engine.probes,
        term_timeout_s=0.0,
        fingerprint=_fingerprint((host, str(port), model.source or model.name), _key_env(model), engine.probes),
    )


def _key_env(model: ModelConfig) -> dict[str, str]:
    """Return what of an external worker's key goes into its fingerprint: another key is another way to ask it."""
    key = model.endpoint_key
    return {"endpoint_key": hashlib.sha256(key.encode()).hexdigest()} if key else {}


def _template(engine: Engine, conditions: Iterable[When]) -> tuple[str, ...]:
    wanted = frozenset(conditions)
    return (*engine.command, *(part for when, parts in engine.options if when in wanted for part in parts))


def _shape(placement: Placement, config: Config, inventory: Inventory) -> set[When]:
    """Return the conditions that a placement's form and links fulfil."""
    several = placement.tp * placement.pp > 1
    shape = {When.SEVERAL_GPUS if several else When.ONE_GPU}
    if placement.tp > 1:
        shape.add(When.TENSOR_PARALLEL)
        if not _has_peer_access(placement, config, inventory):
            shape.add(When.NO_PEER_ACCESS)
    if placement.pp > 1:
        shape.add(When.PIPELINE_PARALLEL)
    return shape


def _has_peer_access(placement: Placement, config: Config, inventory: Inventory) -> bool:
    """Whether the engines' own all-reduce may be used inside every TP group of a placement.

    It writes straight into the other GPUs' memory. On a pair it asks the driver whether it may, and hangs at the
    start where the driver says yes and the PCIe fabric says no; what NCCL would do over the same link is the
    better guess, and ``host.nccl_p2p`` the operator's word. Above two GPUs it is only used over NVLink.
    """
    reach = min(peer_access_reaches(config.host.nccl_p2p), Link.SYS if placement.tp == 2 else Link.NV)
    return all(inventory.link(one, other) <= reach for stage in _stages(placement) for one in stage for other in stage)


def _stages(placement: Placement) -> list[Sequence[GpuId]]:
    """Return the TP groups in pipeline order: neighbouring ranks are one stage, as in vLLM and SGLang."""
    return [placement.gpus[start : start + placement.tp] for start in range(0, len(placement.gpus), placement.tp)]


def _gpu_env(placement: Placement, config: Config) -> dict[str, str]:
    """Return which GPUs the worker sees, in rank order, and how NCCL may join them.

    NCCL has no letters for NODE, nvidia-smi's "between host bridges of one NUMA node": PHB is its nearest, "within
    one NUMA node, through the CPU". An unknown string would be ignored without a word.
    """
    env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(placement.gpus)}
    if len(placement.gpus) > 1:
        match config.host.nccl_p2p:
            case "auto":
                pass
            case "off":
                env["NCCL_P2P_DISABLE"] = "1"
            case "NODE":
                env["NCCL_P2P_LEVEL"] = "PHB"
            case level:
                env["NCCL_P2P_LEVEL"] = level
    return env


def _everywhere(config: Config, engine: Engine) -> dict[str, str]:
    """Return ``[workers] env``, without what ``[engines.NAME] env`` says otherwise."""
    entry = config.engines.get(engine.name)
    return {name: value for name, value in config.workers.env.items() if entry is None or name not in entry.env}


def _pinning(placement: Placement, config: Config, inventory: Inventory) -> tuple[str, ...]:
    """Return numactl's part of the command line; empty when there is nothing to bind to.

    Memory must be bound before the program starts: what is allocated first stays where it is. The environment
    goes before numactl, which takes a ``NAME=value`` behind it for the program.
    """
    if not config.host.numa_pinning or not placement.cpus:
        return ()
    nodes = format_cpu_list(placement.memory_nodes)
    whole = frozenset[int]().union(*(node.cpus for node in inventory.numa_nodes if node.id in placement.memory_nodes))
    cpus = f"--cpunodebind={nodes}" if placement.cpus == whole else f"--physcpubind={format_cpu_list(placement.cpus)}"
    return ("numactl", cpus, f"--membind={nodes}") if nodes else ("numactl", cpus)


def _values(
    placement: Placement, config: Config, model: ModelConfig, port: str, api_key: str, python: str
) -> dict[str, str | tuple[str, ...]]:
    """Return what the placeholders stand for; a tuple becomes several arguments.

    ``drain_s`` is at least 1: 0 tells vLLM to end streams as if they were complete.
    """
    ranks = placement.tp * placement.pp
    return {
        "model": model.source,
        "name": model.name,
        "names": (model.name, *model.aliases),
        "host": config.workers.host,
        "port": port,
        "tp": str(placement.tp),
        "pp": str(placement.pp),
        "ranks": str(ranks),
        "split": ",".join(["1"] * ranks),
        "gpus": ",".join(placement.gpus),
        "drain_s": str(max(1, round(config.workers.drain_timeout_s))),
        "api_key": api_key,
        "cache": folder_of(placement, config),
        "python": python,
    }


def _fill_all(template: Iterable[str], values: Mapping[str, str | tuple[str, ...]], where: str) -> tuple[str, ...]:
    """Return a command line, filled in; a part that is nothing but a placeholder of several values becomes several."""
    filled: list[str] = []
    for part in template:
        whole = placeholders.PATTERN.fullmatch(part)
        several = values.get(whole[1]) if whole else None
        filled.extend(several if isinstance(several, tuple) else [_fill(part, values, where)])
    return tuple(filled)


def _fill(template: str, values: Mapping[str, str | tuple[str, ...]], where: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise L40sError(
                f"{match[0]} stands for nothing",
                where=where,
                hint=f"there are {' '.join(f'{{{name}}}' for name in values)}; double braces are left alone",
                code="bad_config",
            )
        value = values[match[1]]
        return ",".join(value) if isinstance(value, tuple) else value

    return placeholders.PATTERN.sub(value_of, template)


def term_timeout_s(config: Config, engine: Engine) -> float:
    """Return the time from SIGTERM to the kill: the operator's word for this engine, else long enough for it."""
    entry = config.engines.get(engine.name)
    if entry is not None and entry.term_timeout_s > 0:
        return entry.term_timeout_s
    return max(config.workers.term_timeout_s, engine.term_timeout_s)


def _fingerprint(argv: Sequence[str], env: Mapping[str, str], probes: Probes) -> str:
    text = json.dumps([list(argv), dict(env), asdict(probes)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
