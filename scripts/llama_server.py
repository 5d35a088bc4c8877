"""llama.cpp's own HTTP server, out of the `xllamacpp` wheel, behind the command line of `llama-server`.

The demo and the end-to-end tests need a real engine on any machine, without a compiler and without a GPU.
The wheel has the C++ server but no program; this is the program: the usual flags in, the usual behaviour
out, so that the daemon's llama.cpp command line runs unchanged. `scripts/setup` puts it on a PATH as
`llama-server`. Flags that need a GPU are taken and checked; without one they change nothing.

Exit status: 0 stopped by a signal; 1 no server (bad model, port taken) or a second signal; 2 bad usage.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import xllamacpp

GGUF_MAGIC = b"GGUF"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    given = command_line().parse_args(argv)
    problem = model_problem(Path(given.model))
    if problem:
        return fail(problem)
    try:
        # Signals keep their default until the model is loaded: a load is C++ and sees no Python handler.
        server = xllamacpp.Server(parameters(given))
    except (RuntimeError, ValueError, OSError) as error:
        return fail(f"no server on {given.host}:{given.port}: {error}")
    say(f"server is listening on {server.listening_address}")
    wait_for_signal()
    # Ends decoding at once and closes the listener; an open stream delays the exit until its next ping
    # (--sse-ping-interval). A second signal does not wait for that.
    del server
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser: the flags of llama-server that people use, under llama-server's names."""
    either = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model", required=True, metavar="FILE.gguf")
    add("-a", "--alias", default="", help="name that requests use; several with commas")
    add("--host", default=os.environ.get("LLAMA_ARG_HOST", "127.0.0.1"))
    add("--port", type=int, default=int(os.environ.get("LLAMA_ARG_PORT", "8080")))
    add("--api-key", default=os.environ.get("LLAMA_API_KEY", ""), help="several with commas [$LLAMA_API_KEY]")
    add("-c", "--ctx-size", type=int, default=0, help="tokens, shared by all slots; 0: the model's")
    add("-np", "--parallel", type=int, default=1, help="slots: requests decoded at once")
    add("-t", "--threads", type=int, default=0)
    add("--threads-http", type=int, default=0)
    add("-b", "--batch-size", type=int, default=0)
    add("-ub", "--ubatch-size", type=int, default=0)
    add("-cb", "--cont-batching", action=either, default=True)
    add("-ngl", "--n-gpu-layers", "--gpu-layers", type=gpu_layers, default=-1, help="a number, auto or all")
    add("-sm", "--split-mode", choices=["none", "layer", "row", "tensor"], default="layer")
    add("-ts", "--tensor-split", type=shares, default=[], help="share of each GPU, e.g. 1,1")
    add("-mg", "--main-gpu", type=int, default=0)
    add("-fa", "--flash-attn", choices=["on", "off", "auto"], default="auto")
    add("-to", "--timeout", type=int, default=0, help="seconds")
    add("--sse-ping-interval", type=int, default=0, help="seconds between pings on a silent stream")
    add("--cache-ram", type=int, default=None, help="MiB kept of old prompts")
    add("--metrics", action=either, default=False)
    add("--slots", action=either, default=True)
    add("--warmup", action=either, default=True)
    add("--jinja", action=either, default=True)
    add("--ui", "--webui", action=either, default=True)
    add("--reuse-port", action="store_true")
    add("-lv", "--verbosity", type=int, default=None)
    add("--version", action="version", version=f"llama-server of xllamacpp {xllamacpp.__version__}")
    return parser


def parameters(given: argparse.Namespace) -> xllamacpp.CommonParams:
    """Return llama.cpp's own parameters for the flags given; 0 leaves llama.cpp's default."""
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = set(filter(None, given.alias.split(",")))
    params.hostnames = [given.host]
    params.port = given.port
    params.api_keys = list(filter(None, given.api_key.split(",")))
    params.n_parallel = given.parallel
    params.n_ctx = given.ctx_size
    params.n_gpu_layers = given.n_gpu_layers
    params.main_gpu = given.main_gpu
    # Split by tensors, llama.cpp refuses to load without a GPU; there is nothing to split over then.
    if has_gpu():
        params.split_mode = getattr(xllamacpp.llama_split_mode, f"LLAMA_SPLIT_MODE_{given.split_mode.upper()}")
    params.flash_attn_type = getattr(
        xllamacpp.llama_flash_attn_type,
        {"on": "LLAMA_FLASH_ATTN_TYPE_ENABLED", "off": "LLAMA_FLASH_ATTN_TYPE_DISABLED"}.get(
            given.flash_attn, "LLAMA_FLASH_ATTN_TYPE_AUTO"
        ),
    )
    params.cont_batching = given.cont_batching
    params.endpoint_metrics = given.metrics
    params.endpoint_slots = given.slots
    params.warmup = given.warmup
    params.use_jinja = given.jinja
    params.ui = given.ui
    params.reuse_port = given.reuse_port
    if given.tensor_split:
        room = params.tensor_split
        params.tensor_split = [*given.tensor_split, *room[len(given.tensor_split) :]]
    if given.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    for name, value in (
        ("n_batch", given.batch_size),
        ("n_ubatch", given.ubatch_size),
        ("n_threads_http", given.threads_http),
        ("timeout_read", given.timeout),
        ("timeout_write", given.timeout),
        ("sse_ping_interval", given.sse_ping_interval),
    ):
        if value:
            setattr(params, name, value)
    if given.cache_ram is not None:
        params.cache_ram_mib = given.cache_ram
    if given.verbosity is not None:
        params.verbosity = given.verbosity
    return params


def has_gpu() -> bool:
    """Return whether llama.cpp sees any device beside the CPU."""
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return any(device["type"] != cpu for device in xllamacpp.get_device_info())


def model_problem(model: Path) -> str:
    """Return what is wrong with the model file, or nothing. llama.cpp finds the rest while it loads."""
    try:
        with model.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        return f"cannot read the model: {error}"
    return "" if magic == GGUF_MAGIC else f"{model} is no GGUF file: it begins with {magic!r}"


def gpu_layers(text: str) -> int:
    """Return the layers to put on GPUs; -1 is all that fit."""
    return -1 if text in ("all", "auto") else int(text)


def shares(text: str) -> list[float]:
    """Return the relative share of each GPU from `3,1` or `3/1`."""
    return [float(part) for part in text.replace("/", ",").split(",")]


def wait_for_signal() -> None:
    """Return at the first SIGTERM or SIGINT; from then on another one ends the process at once."""
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    stop.wait()


def fail(why: str) -> int:
    """Say why on stderr; return 1."""
    say(why)
    return 1


def say(what: str) -> None:
    """Write one line to stderr, at once."""
    sys.stderr.write(f"llama-server: {what}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
