"""Why an engine ended, as its own output tells it: known lines, each with a phrase for the operator and what mends it.

Engines say why at the first line of a burst and go on to talk: vLLM was seen to write 1,139 lines of tracebacks and
shutdown after the one that mattered, and to end with status 0. So the end of a log says nothing by itself.

Lines were seen with vLLM 0.26 and 0.32 and with llama.cpp 11434; those of SGLang 0.5, TensorRT-LLM 1.0, torch, NCCL
and transformers are from their sources and from logs in users' reports.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LOG_BYTES = 256 << 10
"""How much of a run's output is looked at, from its end."""
BURST_GAP_LINES = 300
"""So many lines without an error between two errors, and the later one began a trouble of its own."""
LINE_LIMIT = 300
"""Characters of a line that stands for itself."""
CONTEXT_LINES = 3
"""Shown from the cause on, where it is not among the last lines anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a run ended.

    Attributes:
        says: What happened, in a phrase; for a line that is not known, the line itself.
        mend: What to do about it; empty where nobody can know.
        line: Its place among the lines.
    """

    says: str
    mend: str = ""
    line: int = 0

    @property
    def text(self) -> str:
        """Both, as one phrase."""
        return f"{self.says} ({self.mend})" if self.mend else self.says


@dataclass(frozen=True, slots=True)
class Known:
    """A line that is known; ``says`` may hold the pattern's named groups in braces."""

    pattern: re.Pattern[str]
    says: str
    mend: str


def _known(pattern: str, says: str, mend: str = "") -> Known:
    return Known(re.compile(pattern), says, mend)


_MEMORY = "fewer or shorter sequences, a smaller model, or more GPUs for each replica (tp, pp)"
_ARGUMENTS = "correct args of the model, or command of its engine; releases differ in what they take"
_SOURCE = "correct source of the model"

ROOTS: tuple[Known, ...] = (
    # GPU memory
    _known(r"No available memory for the cache blocks", "no GPU memory is left for the KV cache beside the weights",
           "a higher --gpu-memory-utilization, or " + _MEMORY),
    _known(r"(?P<need>[\d.]+ GiB) KV cache is needed, which is larger than the available KV cache memory"
           r" \((?P<free>[\d.]+ GiB)\)",
           "one request of full length needs {need} of KV cache and {free} are left",
           "a smaller --max-model-len, or more GPUs for each replica"),
    _known(r"KV cache is needed, which is larger than the available|max seq len \(\d+\) is larger than the maximum",
           "the KV cache does not hold one request of full length",
           "a smaller --max-model-len, or more GPUs for each replica"),
    _known(r"Free memory on device \S* ?\(?(?P<free>[\d.]+)/(?P<all>[\d.]+) GiB\)? on startup is less than desired",
           "only {free} of the GPU's {all} GiB were free at its start",
           "`nvidia-smi` says who holds the rest; or a lower --gpu-memory-utilization"),
    _known(r"Not enough memory\. Please try to increase --mem-fraction-static",
           "no GPU memory is left for the KV cache beside the weights",
           "a higher --mem-fraction-static, or " + _MEMORY),
    _known(r"Executor creation failed due to insufficient GPU memory",
           "no GPU memory is left for the KV cache beside the weights",
           "kv_cache_free_gpu_memory_fraction of TensorRT-LLM, or " + _MEMORY),
    _known(r"CUDA out of memory|CUDA error: out of memory|cudaMalloc failed: out of memory|CUDA_ERROR_OUT_OF_MEMORY"
           r"|failed to allocate CUDA\d* buffer",
           "the GPU ran out of memory", _MEMORY + "; `nvidia-smi` says whether somebody else is on it"),
    # GPUs and drivers
    _known(r"uncorrectable (?:NVLink|ECC) error", "the GPU reported an uncorrectable error",
           "`dmesg | grep Xid`; reset or replace the GPU"),
    _known(r"CUDA driver version is insufficient|NVIDIA driver on your system is too old",
           "the NVIDIA driver is too old for this engine", "a newer driver, or an engine built for an older CUDA"),
    _known(r"no kernel image is available for execution", "this engine was not built for this kind of GPU",
           "another build of the engine, or another quantization"),
    _known(r"invalid literal for int\(\) with base 10: '(?:GPU|MIG)-",
           "this release of the engine cannot read GPUs by UUID", "vLLM 0.26 and newer can"),
    _known(r"No CUDA GPUs are available|no CUDA-capable device is detected|invalid device ordinal",
           "it found no GPU that it may use", "`nvidia-smi`, `l40sctl doctor`"),
    _known(r"Watchdog caught collective operation timeout|ncclRemoteError|NCCL communicator was aborted",
           "its ranks lost each other (NCCL)", "`dmesg | grep Xid`; with bad peer access [host] nccl_p2p = \"off\""),
    _known(r"ncclUnhandledCudaError|ncclSystemError|ncclInternalError|NCCL error",
           "its ranks could not talk to each other (NCCL)", "NCCL_DEBUG=INFO in [workers] env says why"),
    _known(r"CUDA error: (?P<what>[a-z][^\n]{3,80})", "CUDA error: {what}", "`dmesg | grep Xid`"),
    # Arguments and environment
    _known(r"unrecognized arguments: (?P<what>.+)", "it does not know the arguments {what}", _ARGUMENTS),
    _known(r"error: argument (?P<what>.+)", "it refuses an argument: {what}", _ARGUMENTS),
    _known(r"error: the following arguments are required: (?P<what>.+)", "it lacks the arguments {what}", _ARGUMENTS),
    _known(r"error: invalid argument: (?P<what>\S+)|Error: No such option: (?P<what2>\S+)",
           "it does not know the argument {what}", _ARGUMENTS),
    _known(r"(?:attention heads|num_heads)[^\n]*?\(?(?P<heads>\d+)\)? must be divisible by tensor parallel size"
           r" \(?(?P<tp>\d+)",
           "its {heads} attention heads cannot be split over tp = {tp}", "another tp, or pp instead"),
    # Port and libraries
    _known(r"[Aa]ddress already in use|EADDRINUSE|couldn't bind HTTP server socket",
           "its port was taken by somebody else", "it is tried again on another one"),
    _known(r"error while loading shared libraries: (?P<what>[^:\s]+)"
           r"|(?P<what2>lib[\w.+-]+\.so[\w.]*): cannot open shared",
           "the library {what} is missing", "install it, or LD_LIBRARY_PATH in [workers] env"),
    _known(r"ModuleNotFoundError: No module named '?(?P<what>[\w.]+)", "the Python module {what} is missing",
           "install it where the engine is installed"),
    _known(r"cannot import name '?(?P<what>\w+)", "Python cannot import {what}: packages that do not fit each other",
           "install the engine anew, into an environment of its own"),
    # Checkpoint
    _known(r"unknown model architecture: '?(?P<what>[^'\s]+)"
           r"|Model architectures \[(?P<what2>[^\]]+)\] are not supported"
           r"|model type `(?P<what3>[^`]+)` but Transformers does not",
           "this release of the engine does not know the model's architecture {what}", "a newer release of the engine"),
    _known(r"is not a local folder and is not a valid model identifier|Repository Not Found|Repo id must be"
           r"|Invalid repository ID or local directory|LocalEntryNotFoundError|failed to open GGUF file"
           r"|gguf_init_from_file: failed to open",
           "there is no model at its source, or it cannot be reached", _SOURCE),
    _known(r"gated repo|Access to model \S+ is restricted|401 Client Error[^\n]*huggingface",
           "the hub does not give the model to this user", "HF_TOKEN in env of the model"),
    _known(r"SafetensorError|error loading model: (?P<what>.+)", "the checkpoint cannot be read", "fetch it anew"),
    # The host
    _known(r"No space left on device", "a disk, or /dev/shm, is full", "`df -h`"),
    _known(r"Too many open files", "it may open no more files", "LimitNOFILE of l40s-worker@.service"),
    _known(r"can't allocate memory|Cannot allocate memory|std::bad_alloc|^MemoryError",
           "the host ran out of memory", "`free -h`"),
    _known(r"Permission denied: '(?P<what>[^']+)'", "it may not use {what}",
           "its owner and mode; workers run as l40sd's user"),
)  # fmt: skip
"""What explains itself. Of the first line that several match, the earliest here is taken."""

DEATHS: tuple[Known, ...] = (
    _known(r"Worker proc (?P<what>\S+) died unexpectedly", "its rank {what} died and said nothing",
           "`dmesg`: killed for memory, or an Xid of its GPU"),
    _known(r"Child process unexpectedly failed with exitcode=(?P<what>-?\d+)|scheduler is dead",
           "one of its schedulers died", "`dmesg`: killed for memory, or an Xid of its GPU"),
    _known(r"Watchdog timeout", "its scheduler hung (its own watchdog)", "`dmesg | grep Xid`"),
    _known(r"Segmentation fault|SIGSEGV", "a process of it crashed (segmentation fault)"),
    _known(r"terminate called after throwing an instance of '(?P<what>[^']+)'", "a process of it crashed ({what})"),
)  # fmt: skip
"""What may follow from something that was not said."""
ECHOES: tuple[Known, ...] = (
    _known(r"EngineCore failed to start|[Ee]ngine core initialization failed", "its core did not come up"),
    _known(r"EngineDeadError|EngineCore encountered an issue|Engine core proc \S+ died",
           "its core died"),
    _known(r"Executor worker (?:died during initialization|returned error)", "its executor did not come up"),
    _known(r"Received sigquit from a child process", "one of its processes failed"),
    _known(r"Initialization failed\. Please see the error messages above", "it did not come up"),
)  # fmt: skip
"""What only repeats that something else went wrong."""

_PREFILTER = re.compile(
    r"error|exception|traceback|critical|fatal|fail|died|dead|memory|cannot|can't|couldn't|not |unknown|unrecognized"
    r"|too |already|no |lacks|denied|fault|terminate|nccl|watchdog|gated|divisible|larger",
    re.IGNORECASE,
)
_ERROR = re.compile(
    r"\b(?:ERROR|CRITICAL|FATAL)\b|\b(?:fatal|error|panic):|^Error\b|Traceback \(most recent call last\)"
)
_QUIET = re.compile(r"\b(?:\w*WARN(?:ING)?|\w*Warning|INFO|DEBUG|NOTICE)\b")
"""Lines that say themselves that they are no error; vLLM warns at each start of "Too many open files"."""
_RAISED = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure)\b(?:: |$)")
_PREFIX = re.compile(
    r"^(?:\([^)]*\) )?(?:\[?(?:ERROR|CRITICAL|FATAL)\]?:?\s+)?(?:\[?[\d][\d:., T/-]+\]?\s*)?(?:\[[^\]]*\]:? ?)*"
)
"""What loggers put before a line: process, level, time, place."""
OURS = "--- l40sd: "
"""The shim's own lines."""


def find(lines: Sequence[str]) -> Cause | None:
    """Return why the run ended whose output these lines are the end of; None where it does not say.

    1. Only the last burst of errors counts: what a run survived an hour ago did not end it.
    2. The first line in it that explains itself.
    3. Else the first that tells of a death, or with which a traceback ends.
    4. Else the first that echoes either, or calls itself an error.
    """
    burst = _last_burst(lines)  # 1
    for explain in (_root, _death, _echo):  # 2, 3, 4
        for place in burst:
            cause = explain(lines[place], place)
            if cause is not None:
                return cause
    return None


def shown(lines: Sequence[str], cause: Cause | None, limit: int) -> tuple[str, ...]:
    """Return at most ``limit`` lines for the operator: the last ones, and before them the cause's, if it is above."""
    if cause is None or cause.line >= len(lines) - limit:
        return tuple(lines[-limit:])
    first = lines[cause.line : cause.line + CONTEXT_LINES]
    rest = limit - len(first) - 1
    between = len(lines) - rest - cause.line - len(first)
    return (*first, f"... {between} lines ...", *lines[-rest:])


def _last_burst(lines: Sequence[str]) -> list[int]:
    """Return the places of the lines of the last trouble, in order."""
    burst: list[int] = []
    for place in range(len(lines) - 1, -1, -1):
        if burst and burst[-1] - place > BURST_GAP_LINES:
            break
        if _is_error(lines[place]):
            burst.append(place)
    return burst[::-1]


def _is_error(line: str) -> bool:
    if line.startswith(OURS) or not _PREFILTER.search(line) or _QUIET.search(line):
        return False
    if _ERROR.search(line) or _RAISED.match(_bare(line)):
        return True
    return any(known.pattern.search(line) for known in (*ROOTS, *DEATHS, *ECHOES))


def _root(line: str, place: int) -> Cause | None:
    return _match(ROOTS, line, place)


def _death(line: str, place: int) -> Cause | None:
    told = _match(DEATHS, line, place)
    if told is None and _RAISED.match(_bare(line)) and _match(ECHOES, line, place) is None:
        return Cause(says=_bare(line)[:LINE_LIMIT], line=place)
    return told


def _echo(line: str, place: int) -> Cause | None:
    return _match(ECHOES, line, place) or Cause(says=_bare(line)[:LINE_LIMIT], line=place)


def _match(table: Sequence[Known], line: str, place: int) -> Cause | None:
    for known in table:
        found = known.pattern.search(line)
        if found is not None:
            groups = {name.rstrip("0123456789"): text.strip() for name, text in found.groupdict().items() if text}
            return Cause(says=known.says.format_map({"what": "it", **groups}), mend=known.mend, line=place)
    return None


def _bare(line: str) -> str:
    return _PREFIX.sub("", line, count=1).strip()
