"""What an operator's args, env and command may not say, because l40sd says it: most engines obey the later of two.

A worker that listens elsewhere than its port never becomes ready; one that takes other GPUs than it was given sits on
another's (invariant 1), and nobody is told. So these are refused when the configuration is checked. What is meant
otherwise has a place: the pattern, another key, or a ``command`` of one's own, which is the whole line.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

_ADDRESS = "each worker is given an address of its own: [workers] host, port_first and port_last"
_PARALLEL = "say tp and pp in the pattern's replicas"
_GPUS = "which GPUs a worker has follows from the pattern: write a pattern of your own"
_NAMES = "the model's name is that of its [models] table; further ones: aliases"
_SOURCE = "write it as source"
_KEY = "l40sd makes the workers' keys; clients' keys: [proxy] api_keys_file"
_TLS = "workers are spoken to in plain HTTP, on loopback"
_NUMA = "l40sd binds workers to their GPUs' CPUs and memory; to do it yourself: [host] numa_pinning = false"
_DRAIN = "[workers] drain_timeout_s is the time for this"
_SEVERAL = "one worker is one replica on this host: more of them are a count in the pattern"

_COMMON = {"--host": _ADDRESS, "--port": _ADDRESS}
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "vllm": {
        **_COMMON,
        **dict.fromkeys(("--uds", "--grpc"), _ADDRESS),
        **dict.fromkeys(("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"), _PARALLEL),
        **dict.fromkeys(("--prefill-context-parallel-size", "-pcp"), _PARALLEL),
        **dict.fromkeys(("--data-parallel-size", "-dp", "--nnodes", "-n", "--node-rank", "-r", "--headless"), _SEVERAL),
        "--device-ids": _GPUS,
        "--served-model-name": _NAMES,
        "--model": _SOURCE,
        "--api-key": _KEY,
        **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile"), _TLS),
        **dict.fromkeys(("--numa-bind", "--numa-bind-nodes", "--numa-bind-cpus"), _NUMA),
        "--shutdown-timeout": _DRAIN,
    },
    "sglang": {
        **_COMMON,
        **dict.fromkeys(("--tp", "--tp-size", "--tensor-parallel-size"), _PARALLEL),
        **dict.fromkeys(("--pp", "--pp-size", "--pipeline-parallel-size"), _PARALLEL),
        **dict.fromkeys(("--dp", "--dp-size", "--data-parallel-size", "--nnodes", "--node-rank"), _SEVERAL),
        **dict.fromkeys(("--base-gpu-id", "--gpu-id-step"), _GPUS),
        "--served-model-name": _NAMES,
        **dict.fromkeys(("--model", "--model-path"), _SOURCE),
        "--api-key": _KEY,
        **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile"), _TLS),
        "--numa-node": _NUMA,
    },
    "tensorrt-llm": {
        **_COMMON,
        **dict.fromkeys(("--tp-size", "--pp-size"), _PARALLEL),
        "--served-model-name": _NAMES,
    },
    "llama-cpp": {
        **_COMMON,
        **dict.fromkeys(("--split-mode", "-sm", "--tensor-split", "-ts"), _PARALLEL),
        **dict.fromkeys(("--device", "-dev", "--rpc"), _GPUS),
        **dict.fromkeys(("--alias", "-a"), _NAMES),
        **dict.fromkeys(("--model", "-m"), _SOURCE),
        **dict.fromkeys(("--api-key", "--api-key-file"), _KEY),
        **dict.fromkeys(("--ssl-key-file", "--ssl-cert-file"), _TLS),
    },
    "torchrun": {**_COMMON, **dict.fromkeys(("--tp", "--pp"), _PARALLEL)},
    "simulated": {**_COMMON, "--ranks": _PARALLEL, "--model": _NAMES, "--api-key": _KEY},
}
"""Of each built-in engine: an argument, and where what it means is said. Written with ``-`` for ``_``."""

VARIABLES: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": _GPUS,
    "CUDA_DEVICE_ORDER": "GPUs are named by UUID, their order is the ranks'",
    "LLAMA_ARG_DEVICE": _GPUS,
    "VLLM_API_KEY": _KEY,
    "LLAMA_API_KEY": _KEY,
    "L40SD_SIM_API_KEY": _KEY,
    "L40SD_INSTANCE": "workers are told from others' processes by it",
    "L40SD_RUNTIME_DIR": "workers are told from others' processes by it",
}
_PINNING_PROGRAMS = ("numactl", "taskset")


def arguments(base: str | None, args: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each argument that is l40sd's to give, as it was written, with where to say what is meant.

    Args:
        base: The built-in engine that gets them; None: one of the operator's own, whose arguments nobody knows.
    """
    owned = ARGUMENTS.get(base or "", {})
    for argument in args:
        name = argument.partition("=")[0]
        if argument.startswith("-") and (why := owned.get(name.replace("_", "-"))):
            yield name, why


def variables(env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each variable that is l40sd's to set, with where to say what is meant.

    One that is set to what l40sd gives (``{gpus}``, ``{api_key}``), or whose key is taken away, is none.
    """
    for name, value in env.items():
        why = VARIABLES.get(name)
        if why is None or "{gpus}" in value or "{api_key}" in value or (why is _KEY and not value):
            continue
        yield name, why


def pinning(command: Iterable[str]) -> str:
    """Return the program that would bind a worker to other CPUs than its GPUs' (``numactl``); empty: there is none."""
    program = next(iter(command), "")
    name = PurePosixPath(program).name
    return name if name in _PINNING_PROGRAMS else ""


NUMA_HINT = _NUMA


def has_port(command: Iterable[str], env: Mapping[str, str]) -> bool:
    """Whether a command line of the operator's own tells the engine where to listen."""
    return any("{port}" in text for text in (*command, *env.values()))
