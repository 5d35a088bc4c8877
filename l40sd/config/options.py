"""The configuration as records: every option, its default, its unit and its bounds.

This file is the one place where a default is written; etc/l40sd.toml shows the same values and a test
compares the two. ``option(default, doc, ...)`` carries what TOML and the error messages need;
``options_of`` reads it back.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

from l40sd.model import ModelName, Pattern

BUILT_IN_ENGINES = ("vllm", "sglang", "tensorrt-llm", "llama-cpp", "torchrun", "simulated", "external")
NEXT_DAEMON = "needs a restart: `systemctl restart l40sd`"
NEXT_START = "seen by each worker when it is started next"

BUILT_IN_PATTERNS = ("A", "B", "C", "D")
EXTERNAL = "external"


def option(
    default: Any,
    doc: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    restart: bool = False,
    later: str = "",
) -> Any:
    """Return a dataclass field with its documentation and bounds (both inclusive) in the metadata.

    Args:
        restart: A change is seen only by the next daemon: what is in force stays until then, see ``in_force``.
        later: When a change is seen, in words, where it is not seen at once.
    """
    later = later or (NEXT_DAEMON if restart else "")
    metadata = {"doc": doc, "least": least, "most": most, "choices": choices, "restart": restart, "later": later}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is known of one option; ``kind`` is its Python type, e.g. ``tuple[str, ...]``."""

    name: str
    kind: Any
    default: Any
    doc: str
    least: float | None
    most: float | None
    choices: tuple[str, ...]
    restart: bool
    later: str = ""


def options_of(record: type) -> tuple[Option, ...]:
    """Return the options of one of the records below, in order; a model's own name is none."""
    return tuple(
        Option(
            name=each.name,
            kind=each.type,
            default=each.default_factory() if each.default_factory is not MISSING else each.default,
            **each.metadata,
        )
        for each in fields(record)
        if each.metadata
    )


def slug(name: str) -> str:
    """Return a model's name as it appears in worker ids and unit names: only ``[a-z0-9-]``, maybe empty."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """``[daemon]``: where things live and what is applied first."""

    pattern: str = option(
        "A",
        "applied at the first start; afterwards the last applied pattern is kept",
        later="for a first start only: `l40sctl switch-pattern` changes it now",
    )
    state_dir: str = option("/var/lib/l40sd", "what is wanted, kept over reboots", restart=True)
    runtime_dir: str = option("/run/l40sd", "instances, lock and control socket; gone after a reboot", restart=True)
    log_dir: str = option("/var/log/l40sd", "the workers' output", restart=True)
    cache_dir: str = option(
        "", "what engines compile, a folder for each model and shape; empty: cache in state_dir", later=NEXT_START
    )
    control_socket: str = option("", "empty: control.sock in runtime_dir", restart=True)
    control_group: str = option(
        "l40sd", "group that may use the control socket; ignored where it does not exist", restart=True
    )
    log_level: str = option("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))
    log_format: str = option(
        "text", "of the journal's lines and of a file's: text or json", choices=("text", "json"), restart=True
    )
    orphan_grace_s: float = option(
        600.0,
        "workers of a daemon gone for longer than this stop themselves",
        least=1,
        most=7 * 86400,
        later=NEXT_START,
    )
    provider: str = option(
        "auto",
        "who holds the workers' processes: unit (systemd template), cgroup, none; auto: the first that works",
        choices=("auto", "unit", "cgroup", "none"),
        restart=True,
    )
    stop_timeout_s: float = option(
        120.0,
        "all workers are drained and stopped within this time when the daemon is told to stop",
        least=1,
        most=3600,
    )
    events_kept: int = option(
        1000, "events that `l40sctl events` can look back on", least=10, most=100_000, restart=True
    )
    request_events_kept: int = option(
        1000, "events about single requests that are kept besides, of each kind", least=10, most=100_000, restart=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """``[host]``: what the machine is made of."""

    inventory: str = option(
        "auto",
        "auto (NVML and /sys), a host file, or the name of a bundled host, e.g. l40s-12-4+2",
        restart=True,
    )
    nvml_timeout_s: float = option(
        20.0, "NVML is given up for now when it has not answered", least=0.1, most=300, restart=True
    )
    gpu_check_interval_s: float = option(10.0, "between two looks whether every GPU answers", least=0.05, most=3600)
    gpu_rescan_interval_s: float = option(
        60.0, "while a GPU is missing: between two searches for GPUs that came back", least=0.05, most=86400
    )
    numa_pinning: bool = option(default=True, doc="bind workers to their GPUs' CPUs and memory with numactl")
    nccl_p2p: str = option(
        "auto",
        "auto (NCCL's own choice), off (NCCL_P2P_DISABLE=1), or NCCL_P2P_LEVEL: PIX, PXB, PHB, NODE, SYS",
        choices=("auto", "off", "PIX", "PXB", "PHB", "NODE", "SYS"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """``[proxy]``: the endpoint."""

    listen: tuple[str, ...] = option(
        ("127.0.0.1:8080",),
        "host:port or unix:/path, any number",
        restart=True,
        later=f"{NEXT_DAEMON}; an address that l40sd.socket holds is changed there as well, then stop and start",
    )
    api_keys_file: str = option("", "one key a line, # comments; empty: everybody may ask")
    cors_origins: tuple[str, ...] = option(
        (), "web pages that may use it from a browser: https://host, http://host:port or *; none: CORS is off"
    )
    queue_limit: int = option(1000, "requests that may wait for a worker, per model", least=0, most=1_000_000)
    queue_timeout_s: float = option(120.0, "longest wait for a worker on its way, then 503", least=0, most=86400)
    in_flight_limit: int = option(
        0, "requests at once on one worker; 0: no limit, the engine queues", least=0, most=100_000
    )
    connect_timeout_s: float = option(5.0, "for a connection to a worker", least=0.01, most=300)
    first_byte_timeout_s: float = option(600.0, "for the first byte of a worker's reply", least=0.1, most=86400)
    idle_timeout_s: float = option(300.0, "longest silence within a worker's reply", least=0.1, most=86400)
    client_header_timeout_s: float = option(10.0, "for a client's whole request head", least=0.1, most=600)
    client_body_timeout_s: float = option(30.0, "longest silence within a client's request body", least=0.1, most=3600)
    client_idle_timeout_s: float = option(75.0, "idle keep-alive connections are closed", least=0.1, most=86400)
    upstream_idle_timeout_s: float = option(
        4.0,
        "idle connections to workers are closed; below the engines' own (vLLM: 5 s)",
        least=0.1,
        most=3600,
    )
    head_limit_bytes: int = option(32768, "request head, then 431", least=1024, most=1 << 20)
    body_limit_bytes: int = option(64 << 20, "request body, then 413", least=1024, most=1 << 32)
    body_memory_bytes: int = option(
        1 << 30,
        "all request bodies under way, then 503; at least one of body_limit_bytes fits",
        least=1 << 20,
        most=1 << 40,
    )
    connection_limit: int = option(20000, "client connections at once, then 503", least=1, most=1_000_000)
    address_connection_limit: int = option(
        0,
        "of them from one address (IPv6: one /64), then 429; 0: three quarters of connection_limit",
        least=0,
        most=1_000_000,
    )
    handover_timeout_s: float = option(
        1.0, "an upgrade: for connections to reach a point where they can be handed over", least=0.05, most=60
    )
    retries: int = option(
        2, "further workers that a request is tried on before its first byte came back", least=0, most=10
    )
    poison_refused_s: float = option(
        300.0, "a request that two workers died of is refused at once for this long; 0: never", least=0, most=86400
    )
    poison_limit: int = option(1000, "such requests remembered, as hashes", least=0, most=1_000_000)
    failures_logged_per_minute: int = option(
        60, "warnings about failed requests; further ones are counted; 0: none", least=0, most=100_000
    )
    access_log: bool = option(default=False, doc="one line a request; costs more than the request itself")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersConfig:
    """``[workers]``: starting, stopping, restarting."""

    env: Mapping[str, str] = option(
        {}, "added to every worker's environment, e.g. NCCL_*, HF_HOME; models' own goes first"
    )
    host: str = option("127.0.0.1", "address that workers listen on", restart=True)
    port_first: int = option(30000, "first port given to workers", least=1024, most=65535, restart=True)
    port_last: int = option(30999, "last port given to workers", least=1024, most=65535, restart=True)
    start_parallel: int = option(
        0, "workers that may be starting at once; 0: as many as this host's memory and CPUs load", least=0, most=64
    )
    min_ready: float = option(
        0.5,
        "share of a model's capacity kept ready during a pattern change, where the GPUs allow it",
        least=0,
        most=1,
    )
    proof_kept_s: float = option(
        3600.0,
        "a launch that served within this time need not prove itself again in a change; 0: each time anew",
        least=0,
        most=7 * 86400,
    )
    drain_timeout_s: float = option(
        120.0, "a drained worker is stopped after this even with requests in flight", least=0, most=86400
    )
    term_timeout_s: float = option(
        20.0, "from SIGTERM to the kill of the whole process tree", least=0.1, most=3600, later=NEXT_START
    )
    kill_timeout_s: float = option(10.0, "from the kill until a worker counts as stuck", least=0.1, most=600)
    spawn_timeout_s: float = option(10.0, "for a worker's shim to report its engine's pid", least=0.1, most=300)
    gpu_free_timeout_s: float = option(
        60.0, "for a GPU's memory to be free before its next worker starts", least=0, most=3600
    )
    backoff_first_s: float = option(
        5.0, "a worker that was ready: first delay, after one restart at once", least=0, most=3600
    )
    backoff_limit_s: float = option(300.0, "a worker that was ready: longest delay", least=0, most=86400)
    backoff_never_ready_first_s: float = option(
        15.0, "a worker that never became ready: first delay", least=0, most=3600
    )
    backoff_never_ready_limit_s: float = option(
        600.0, "a worker that never became ready: longest delay", least=0, most=86400
    )
    quarantine_alike: int = option(3, "starts in a row that fail alike, then the worker is given up", least=1, most=100)
    quarantine_per_hour: int = option(6, "restarts within an hour, then the same", least=1, most=1000)
    given_up_retry_s: float = option(
        3600.0,
        "one that was given up is tried once more after this, or at `l40sctl reset`; 0: never",
        least=0,
        most=7 * 86400,
    )
    refused_retry_s: float = option(
        60.0, "one that cannot be started as configured: first after this, doubling to that", least=1, most=86400
    )
    healthy_after_s: float = option(600.0, "healthy for this long clears the record of failures", least=0, most=86400)
    cache_limit_bytes: int = option(
        20 << 30,
        "what engines compiled and nobody has used for longest goes above this; 0: no cache",
        least=0,
        most=1 << 50,
        later=NEXT_START,
    )
    log_file_bytes: int = option(
        16 << 20, "size of one file of a worker's output", least=4096, most=1 << 34, later=NEXT_START
    )
    log_files: int = option(4, "files kept of a worker's output", least=1, most=100, later=NEXT_START)
    pids_limit: int = option(
        4096,
        "processes and threads of one worker, where cgroups allow it",
        least=16,
        most=1_000_000,
        later=NEXT_START,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """``[health]``: has it come up, may it receive requests, is it making tokens."""

    LATER: ClassVar[str] = NEXT_START

    probe_interval_s: float = option(2.0, "between two readiness probes", least=0.05, most=300)
    probe_timeout_s: float = option(2.0, "for one readiness probe", least=0.05, most=300)
    startup_interval_s: float = option(0.25, "between two probes of a starting worker", least=0.02, most=60)
    fall: int = option(3, "failed probes in a row, then no more requests", least=1, most=100)
    rise: int = option(2, "good probes in a row, then requests again", least=1, most=100)
    startup_timeout_s: float = option(
        600.0, "deadline for a start, before what the checkpoint's size adds", least=1, most=86400
    )
    load_bytes_per_s: int = option(
        200_000_000, "slowest reading of a checkpoint that still counts as loading", least=1, most=1 << 40
    )
    startup_stall_s: float = option(
        300.0,
        "a start past its deadline goes on while it shows progress at least this often",
        least=1,
        most=86400,
    )
    stall_timeout_s: float = option(
        120.0, "requests running and no token for this long: hung, restarted", least=1, most=86400
    )
    canary_interval_s: float = option(
        60.0, "an idle worker is asked for one token this often; 0: never", least=0, most=86400
    )
    canary_timeout_s: float = option(60.0, "for that token", least=0.1, most=3600)
    unready_timeout_s: float = option(
        600.0, "its probes fail for this long and it has no requests: restarted; 0: never", least=0, most=86400
    )
    eject_failures: int = option(
        5, "requests failed in a row, or most of so many of late: no more for a while; 0: never", least=0, most=10_000
    )
    eject_share: float = option(0.5, "most: this share of the requests of late", least=0.05, most=1)
    eject_half_life_s: float = option(10.0, "a request that ended so long ago counts half", least=0.1, most=3600)
    eject_first_s: float = option(
        10.0, "out for this long, doubling each time it comes back no better", least=0.1, most=3600
    )
    eject_limit_s: float = option(300.0, "longest time out", least=0.1, most=86400)
    eject_out_share: float = option(
        0.5, "no more of a model's live workers than this are out at once, and never the last", least=0, most=1
    )
    slow_start_s: float = option(30.0, "its share of the requests grows this long when it is back", least=0, most=3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """``[engines.NAME]``: changes to a built-in engine, or one of your own.

    Every field left alone keeps the built-in table's value (engines/table.py).
    """

    base: str = option("", "built-in engine that this one starts from; empty: the one of the same name")
    command: tuple[str, ...] = option(
        (),
        "whole command line; filled in: {model} {name} {names} {host} {port} {tp} {pp} {ranks} {gpus} {api_key} ...",
    )
    env: Mapping[str, str] = option({}, "added to the worker's environment; an empty value removes one")
    health_path: str = option("", "GET answers 200 when ready")
    metrics_path: str = option("", "Prometheus text")
    term_to: str = option(
        "",
        "who gets SIGTERM: engine (the process that ends its others), or the whole process group; empty: as built in",
        choices=("", "engine", "group"),
        later=NEXT_START,
    )
    term_timeout_s: float = option(0.0, "0: [workers] term_timeout_s", least=0, most=3600, later=NEXT_START)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """``[models.NAME]``: one model."""

    name: ModelName
    engine: str = option("vllm", "vllm, sglang, tensorrt-llm, llama-cpp, torchrun, simulated, external, or your own")
    source: str = option("", "a path or a hub id, as the engine takes it")
    aliases: tuple[str, ...] = option((), "further names that requests may use")
    args: tuple[str, ...] = option((), "appended to the command line")
    env: Mapping[str, str] = option({}, "added to the worker's environment")
    endpoints: tuple[str, ...] = option((), "external only: the workers' addresses, http://host:port")
    endpoint_key: str = option("", "external only: API key of these workers")
    attention_heads: int = option(0, "0: from the checkpoint's config.json, if there is one", least=0, most=1024)
    startup_timeout_s: float = option(
        0.0, "0: from [health] and the checkpoint's size", least=0, most=86400, later=NEXT_START
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration, checked."""

    daemon: DaemonConfig = DaemonConfig()
    host: HostConfig = HostConfig()
    proxy: ProxyConfig = ProxyConfig()
    workers: WorkersConfig = WorkersConfig()
    health: HealthConfig = HealthConfig()
    engines: Mapping[str, EngineConfig] = field(default_factory=dict)
    models: Mapping[ModelName, ModelConfig] = field(default_factory=dict)
    patterns: Mapping[str, Pattern] = field(default_factory=dict)


def is_external(model: ModelConfig, engines: Mapping[str, EngineConfig]) -> bool:
    """Return whether somebody else runs this model's workers: they are only probed and routed to, and take no GPUs.

    That is so for the engine ``external``, and for one of the operator's own with that base, unless it has a command:
    what has a command is run here.
    """
    entry = engines.get(model.engine, EngineConfig())
    return (entry.base or model.engine) == EXTERNAL and not entry.command


def in_force(started: Config, fresh: Config) -> Config:
    """Return what is in force after a reload of ``fresh`` in a daemon that was started with ``started``."""
    sections = {each.name: getattr(fresh, each.name) for each in fields(Config) if is_dataclass(each.default)}
    kept = {
        name: {o.name: getattr(getattr(started, name), o.name) for o in options_of(type(section)) if o.restart}
        for name, section in sections.items()
    }
    return replace(fresh, **{name: replace(section, **kept[name]) for name, section in sections.items()})
