"""The engines: how each is started, asked how it is, and stopped. One record an engine, nothing hidden elsewhere.

Commands are templates; engines/launch.py fills them in. What a record claims was seen by running the version
named above it, unless it says [source] (read in that version's package) or [docs].

Two facts decide most of the choices below:

- A worker's API key must not be readable in `ps`, so it travels in the environment wherever the engine
  reads one there. SGLang takes it on the command line only; TensorRT-LLM takes none at all.
- "Is it making tokens" needs counters that move *while* a request runs, not when it ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum

from l40sd.config.options import EngineConfig
from l40sd.errors import L40sError


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """How one engine shows that it lives, and what it counts.

    Attributes:
        health_path: GET answers 200 when it can serve.
        health_timeout_s: Least deadline for that GET, for an engine that works before it answers; 0: the config's.
        models_path: GET lists the served names; empty: the engine has no such list.
        token_path: POST makes one token here (``/v1/completions``); empty: it cannot be asked.
        metrics_path: Prometheus text; empty: none.
        metrics_need_key: The scrape needs the worker's API key (llama.cpp).
        running_metric: Gauge of requests being decoded; empty: unknown.
        waiting_metric: Gauge of requests in the engine's own queue; empty: unknown.
        tokens_metrics: Counters that move whenever the engine makes progress; their sum is watched.
    """

    health_path: str = "/health"
    health_timeout_s: float = 0.0
    models_path: str = "/v1/models"
    token_path: str = "/v1/completions"
    metrics_path: str = "/metrics"
    metrics_need_key: bool = False
    running_metric: str = ""
    waiting_metric: str = ""
    tokens_metrics: tuple[str, ...] = ()


class TermTo(StrEnum):
    """Who gets SIGTERM when an engine shall end."""

    ENGINE = "engine"  # the process that ends its own others: the leader, or behind a wrapper the one that it runs
    GROUP = "group"  # the whole process group at once


class When(StrEnum):
    """A condition on one worker, under which a part of a command line is wanted."""

    ONE_GPU = "tp x pp = 1"
    SEVERAL_GPUS = "tp x pp > 1"
    TENSOR_PARALLEL = "tp > 1"
    PIPELINE_PARALLEL = "pp > 1"
    NO_PEER_ACCESS = "the TP groups' GPUs cannot write into each other's memory"
    API_KEY = "the worker has an API key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One serving program.

    Attributes:
        command: Its command line, with ``{placeholders}``; empty: somebody else runs it.
        options: Further arguments, each under its condition, in this order.
        env: Environment, with ``{placeholders}``; an entry made of an empty API key, or of no cache, is left out.
        term_to: Who is told to stop; the others are told once it is gone.
        term_timeout_s: What a clean exit of an idle engine may take, where the config's usual time may be too short.
        ends_streams: Every whole stream ends with its API's last event (``[DONE]``, ``message_stop``).
        tp_or_pp: It splits a model one way or the other, never both.
    """

    name: str
    command: tuple[str, ...]
    options: tuple[tuple[When, tuple[str, ...]], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    probes: Probes = Probes()
    term_to: TermTo = TermTo.ENGINE
    term_timeout_s: float = 0.0
    ends_streams: bool = False
    tp_or_pp: bool = False

    @property
    def is_external(self) -> bool:
        """Somebody else runs the workers; they are only probed and routed to."""
        return not self.command


# What torch compiles goes where it is private and bounded. By default it is below TMPDIR and gone with the run, or in
# the home directory for ever.
_COMPILERS = {"TORCHINDUCTOR_CACHE_DIR": "{cache}/inductor", "TRITON_CACHE_DIR": "{cache}/triton"}

# vLLM 0.32.0.
# - Up to at least 0.26 a compiled model's hash takes in VLLM_API_KEY: another key, another 16 to 27 s of compilation.
# - While it loads the port is closed; 503 from /health means that EngineCore reported its end. /health stays 200 while
#   EngineCore hangs and while a draining server finishes its streams.
# - --shutdown-timeout 0, its default, ends open streams at SIGTERM as if they were complete (finish_reason "abort",
#   then [DONE]). With the drain's time they run to their end; what is cut after that is cut visibly.
# - SIGTERM to the API server alone: it drains, then ends EngineCore and the ranks. To all of them: TP and PP ranks end
#   at once, and every open stream with them. Until its Python has come to the handler, SIGTERM just ends it.
# - It then keeps its port until the last stream is done: /health says 200, a new request gets 500.
# - With a key, /health and /metrics stay open.
# - iteration_tokens_total counts engine steps: it moves during a long chunked prefill, when both token counters rest.
# - Custom all-reduce on a pair without working peer access hangs at the start; above two GPUs it wants NVLink.
# - mp is said aloud because vLLM picks Ray by itself on a machine that is part of a Ray cluster [docs].
# - CUDA_VISIBLE_DEVICES by UUID: 0.26 reads it, seen on GPUs at TP1, TP2 and PP2; up to at least 0.20 it ended with
#   ValueError (vllm issues 13815, 41848).
# - It leaves some ten sockets in TMPDIR at each end, and after a crash its vllm_dist_* in /dev/shm: the shim clears up.
_VLLM = Engine(
    name="vllm",
    command=(
        *("vllm", "serve", "{model}", "--served-model-name", "{names}", "--host", "{host}", "--port", "{port}"),
        *("--tensor-parallel-size", "{tp}", "--pipeline-parallel-size", "{pp}"),
        *("--shutdown-timeout", "{drain_s}", "--disable-access-log-for-endpoints", "/health,/metrics"),
    ),
    options=(
        (When.SEVERAL_GPUS, ("--distributed-executor-backend", "mp")),
        (When.NO_PEER_ACCESS, ("--disable-custom-all-reduce",)),
    ),
    env={"VLLM_API_KEY": "{api_key}", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": "{cache}/vllm", **_COMPILERS},
    ends_streams=True,
    probes=Probes(
        running_metric="vllm:num_requests_running",
        waiting_metric="vllm:num_requests_waiting",
        tokens_metrics=(
            "vllm:generation_tokens_total",
            "vllm:prompt_tokens_total",
            "vllm:iteration_tokens_total_count",
        ),
    ),
)

# SGLang 0.5.23 [source].
# - /health makes a token when idle and takes a second or more; with the variable below it is a plain yes or no, 503
#   while starting and from the first moment of a drain. The token is asked for at start and by the idle canary.
# - The API key is an argument only: users of this machine can see it in `ps`.
# - SIGTERM drains without limit, looking every 5 s, then gives its schedulers 15 s. It goes to the main process, whose
#   children die with it.
_SGLANG = Engine(
    name="sglang",
    command=(
        *("python3", "-m", "sglang.launch_server", "--model-path", "{model}", "--served-model-name", "{name}"),
        *("--host", "{host}", "--port", "{port}", "--tp-size", "{tp}", "--pp-size", "{pp}", "--enable-metrics"),
    ),
    options=(
        (When.API_KEY, ("--api-key", "{api_key}")),
        (When.NO_PEER_ACCESS, ("--disable-custom-all-reduce",)),
    ),
    env={"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0", **_COMPILERS},
    ends_streams=True,
    probes=Probes(
        running_metric="sglang:num_running_reqs",
        waiting_metric="sglang:num_queue_reqs",
        tokens_metrics=("sglang:generation_tokens_total", "sglang:prompt_tokens_total"),
    ),
    term_timeout_s=25.0,
)

# TensorRT-LLM, command line of 2026 [docs].
# - It takes no API key. Its port is bound before loading but listens only afterwards: probes are refused until then.
# - /metrics is JSON; the Prometheus text needs `return_perf_metrics: true` in a --config file. Without it the scrape
#   finds nothing and only the idle canary can tell a hung engine.
_TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    command=(
        *("trtllm-serve", "{model}", "--served_model_name", "{name}", "--host", "{host}", "--port", "{port}"),
        *("--tp_size", "{tp}", "--pp_size", "{pp}", "--no-telemetry"),
    ),
    env=_COMPILERS,
    ends_streams=True,
    probes=Probes(
        metrics_path="/prometheus/metrics",
        running_metric="trtllm_num_requests_running",
        waiting_metric="trtllm_num_requests_waiting",
        tokens_metrics=("trtllm_generation_tokens_total",),
    ),
)

# llama.cpp's server, release 11434.
# - /health: refused, 503 while loading, 200. With a key everything else asks for it, /metrics too.
# - SIGTERM does not drain. Generation stops, but an open stream and the process live on until the next SSE ping:
#   30 s by default, 2.1 s at an interval of 1.
# - tokens_predicted_total and prompt_tokens_total move when a request ends; n_decode_total moves with every batch.
# - A model is split by tensors or by layers, not both.
_LLAMA_CPP = Engine(
    name="llama-cpp",
    command=(
        *("llama-server", "-m", "{model}", "-a", "{name}", "--host", "{host}", "--port", "{port}"),
        *("--metrics", "--slots", "--sse-ping-interval", "1", "-ngl", "all"),
    ),
    options=(
        (When.ONE_GPU, ("-sm", "none")),
        (When.TENSOR_PARALLEL, ("-sm", "tensor", "-ts", "{split}")),
        (When.PIPELINE_PARALLEL, ("-sm", "layer", "-ts", "{split}")),
    ),
    env={"LLAMA_API_KEY": "{api_key}"},
    ends_streams=True,
    probes=Probes(
        metrics_need_key=True,
        running_metric="llamacpp:requests_processing",
        waiting_metric="llamacpp:requests_deferred",
        tokens_metrics=(
            "llamacpp:n_decode_total",
            "llamacpp:tokens_predicted_total",
            "llamacpp:prompt_tokens_total",
        ),
    ),
    tp_or_pp=True,
)

# torchrun, torch 2.13. `source` is a script that serves HTTP at --host and --port and answers GET /health from rank 0;
# what else it offers can be said in [engines.NAME]. Restarts are ours: torchrun's own were seen to chase each other.
# It has no API key of its own: an [engines.NAME] with env = {MY_KEY = "{api_key}"} gives the script one.
_TORCHRUN = Engine(
    name="torchrun",
    command=(
        *("torchrun", "--nnodes", "1", "--nproc-per-node", "{ranks}", "--max-restarts", "0", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "127.0.0.1:0", "{model}", "--host", "{host}", "--port", "{port}", "--tp", "{tp}"),
        *("--pp", "{pp}"),
    ),
    env={"PYTHONUNBUFFERED": "1"},
    probes=Probes(models_path="", token_path="", metrics_path=""),
)

# sim/engine.py: no model, no GPU; for trying things and for tests. {python} is the daemon's own interpreter.
_SIMULATED = Engine(
    name="simulated",
    command=(
        *("{python}", "-m", "l40sd.sim.engine", "--model", "{names}", "--host", "{host}", "--port", "{port}"),
        *("--ranks", "{ranks}"),
    ),
    env={"L40SD_SIM_API_KEY": "{api_key}"},
    ends_streams=True,
    probes=Probes(
        running_metric="simulated:requests_running",
        waiting_metric="simulated:requests_waiting",
        tokens_metrics=("simulated:tokens_total",),
    ),
)

# Whatever speaks OpenAI's API at an address. Which counters it has is unknown, so only the idle canary watches it.
_EXTERNAL = Engine(name="external", command=(), probes=Probes(metrics_path=""))

ENGINES: Mapping[str, Engine] = {
    engine.name: engine for engine in (_VLLM, _SGLANG, _TENSORRT_LLM, _LLAMA_CPP, _TORCHRUN, _SIMULATED, _EXTERNAL)
}


OWNERS = {"vllm": _VLLM, "sglang": _SGLANG, "tensorrt_llm": _TENSORRT_LLM, "llamacpp": _LLAMA_CPP}
"""By what they call themselves as the owner of a model in ``/v1/models``."""


def ends_streams(owned_by: str) -> bool:
    """Return whether the engine that calls itself so ends every whole stream with its API's last event."""
    owner = OWNERS.get(owned_by)
    return owner is not None and owner.ends_streams


def resolve(name: str, configured: Mapping[str, EngineConfig]) -> Engine:
    """Return the engine of this name: the built-in one with the changes of ``[engines.NAME]``, or the operator's own.

    1. The base: ``base`` of the entry, else the built-in of the same name, else a bare OpenAI-compatible server.
    2. Over it, every field that the entry sets. A command of its own replaces the options too: it is the whole line.

    Raises:
        L40sError: No such engine, no such base, or an engine of one's own without a command.
    """
    entry = configured.get(name)
    if entry is None:
        if name not in ENGINES:
            raise _unknown(name, [*ENGINES, *configured], where="engine")
        return ENGINES[name]
    where = f"engines.{name}"
    if entry.base and entry.base not in ENGINES:
        raise _unknown(entry.base, list(ENGINES), where=f"{where}.base")
    base = ENGINES.get(entry.base or name)
    if base is None:
        if not entry.command:
            raise L40sError(
                f"{name} is not built in and says neither a base nor a command",
                where=where,
                hint=f"set base to one of {', '.join(ENGINES)}, or command to its whole command line",
                code="bad_config",
            )
        base = Engine(name=name, command=entry.command)
    return replace(
        base,
        name=name,
        command=entry.command or base.command,
        options=() if entry.command else base.options,
        env={key: value for key, value in {**base.env, **entry.env}.items() if value},
        term_to=TermTo(entry.term_to) if entry.term_to else base.term_to,
        probes=replace(
            base.probes,
            health_path=entry.health_path or base.probes.health_path,
            metrics_path=entry.metrics_path or base.probes.metrics_path,
        ),
        ends_streams=base.ends_streams and not entry.command,
        tp_or_pp=base.tp_or_pp and not entry.command,
    )


def _unknown(name: str, known: list[str], *, where: str) -> L40sError:
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(dict.fromkeys(known))}"
    return L40sError(f"there is no engine {name!r}", where=where, hint=hint, code="unknown_engine")
