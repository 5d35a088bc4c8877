"""What an engine's output tells of its end; lines as engines wrote them, shortened."""

from collections.abc import Sequence

import pytest

from l40sd.core.logcauses import BURST_GAP_LINES, Cause, find, shown

CHATTER = [f"(APIServer pid=7) INFO 11-28 14:00:55 [core_client.py:770] [shutdown] line {n}" for n in range(1100)]
RANK_DIED = [
    'INFO:     127.0.0.1:44720 - "POST /v1/completions HTTP/1.1" 200 OK',
    "(EngineCore pid=28392) ERROR 11-28 14:00:43 [multiproc_executor.py:315] Worker proc VllmWorker-0 died unexpectedly"
    " (exit code: None), shutting down executor.",
    "(EngineCore pid=28392) ERROR 11-28 14:00:52 [core.py:1512] Traceback (most recent call last):",
    '(EngineCore pid=28392) ERROR 11-28 14:00:52 [core.py:1512]     raise RuntimeError("cancelled")',
    "(EngineCore pid=28392) ERROR 11-28 14:00:52 [core.py:1512] RuntimeError: cancelled",
    "(APIServer pid=28174) ERROR 11-28 14:00:52 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError:"
    " EngineCore encountered an issue. See stack trace (above) for the root cause.",
]
KNOWN_LINES = {
    # what it says -> the lines, as the engine wrote them
    "its rank VllmWorker-0 died": RANK_DIED,
    "the GPU ran out of memory": [
        "(EngineCore pid=5) ERROR 11-28 13:00:00 [core.py:900] EngineCore failed to start.",
        "(EngineCore pid=5) ERROR 11-28 13:00:00 [core.py:900] torch.OutOfMemoryError: CUDA out of memory. Tried to"
        " allocate 2.00 GiB. GPU 0 has a total capacity of 44.39 GiB of which 1.12 GiB is free.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ],
    "no GPU memory is left for the KV cache": [
        "(EngineCore pid=5) ERROR 11-28 13:00:00 [core.py:900] ValueError: No available memory for the cache blocks."
        " Try increasing `gpu_memory_utilization` when initializing the engine."
    ],
    "needs 16.00 GiB of KV cache and 9.27 GiB are left": [
        "ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is"
        " needed, which is larger than the available KV cache memory (9.27 GiB). Based on the available memory, ..."
    ],
    "only 3.10 of the GPU's 44.39 GiB were free": [
        "ValueError: Free memory on device cuda:0 (3.10/44.39 GiB) on startup is less than desired GPU memory"
        " utilization (0.92, 40.8 GiB)."
    ],
    "it does not know the arguments --no-such-flag": [
        "usage: vllm [-h] [-v] {chat,complete,serve} ...",
        "vllm: error: unrecognized arguments: --no-such-flag",
    ],
    "it does not know the argument --no-such": ["error: invalid argument: --no-such"],
    "it refuses an argument: --max-model-len": ["vllm serve: error: argument --max-model-len: invalid value: 'x'"],
    "its port was taken": [
        '  File "/opt/vllm/entrypoints/launchers/launcher.py", line 348, in create_server_socket',
        "OSError: [Errno 98] Address already in use",
    ],
    "the library libnvshmem.so.3 is missing": [
        "Traceback (most recent call last):",
        "ImportError: libnvshmem.so.3: cannot open shared object file: No such file or directory",
    ],
    "the library libcudart.so.12 is missing": [
        "llama-server: error while loading shared libraries: libcudart.so.12: cannot open shared object file"
    ],
    "cannot read GPUs by UUID": ["ValueError: invalid literal for int() with base 10: 'GPU-0f1c2d3e-aaaa'"],
    "its 40 attention heads cannot be split over tp = 3": [
        "ValueError: Total number of attention heads (40) must be divisible by tensor parallel size (3)."
    ],
    "architecture mamba9": ["llama_model_load: error loading model: unknown model architecture: 'mamba9'"],
    "CUDA error: an illegal memory access was encountered": [
        "[rank1]: RuntimeError: CUDA error: an illegal memory access was encountered"
    ],
    "its ranks lost each other": ["[rank0]:[E1128 NCCL] Watchdog caught collective operation timeout: WorkNCCL(..."],
    "there is no model at its source": [
        "OSError: meta/lama is not a local folder and is not a valid model identifier listed on 'https://hf.co/models'"
    ],
    "one of its schedulers died": [
        "[2026-11-28 13:00:00] Child process unexpectedly failed with exitcode=-9. pid=4711",
    ],
    "kv_cache_free_gpu_memory_fraction": [  # TensorRT-LLM
        "[07/08/2025-19:47:15] [TRT-LLM] [RANK 1] [E] Failed to initialize executor on rank 1: Executor creation failed"
        " due to insufficient GPU memory.",
        "RuntimeError: Executor worker returned error",
    ],
    "FileNotFoundError: [Errno 2] No such file or directory: 'ninja'": [  # SGLang: why, then what follows from it
        "[2026-02-27 15:27:12] Scheduler hit an exception: Traceback (most recent call last):",
        "FileNotFoundError: [Errno 2] No such file or directory: 'ninja'",
        "[2026-02-27 15:27:13] Received sigquit from a child process. It usually means the child failed.",
    ],
    "its executor did not come up": ["RuntimeError: Executor worker died during initialization"],
    "one of its processes failed": [
        "[2026-02-27 15:27:13] Received sigquit from a child process. It usually means the child failed.",
        "RuntimeError: Initialization failed. Please see the error messages above.",
    ],
    "a higher --mem-fraction-static": [
        "[2026-02-27 15:27:12 TP0] Scheduler hit an exception: Traceback (most recent call last):",
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
        "[2026-02-27 15:27:13] Received sigquit from a child process. It usually means the child failed.",
    ],
    "its ranks could not talk to each other": [
        "RuntimeError: NCCL error: remote process exited or there was a network error",
        "[2026-02-27 15:27:13] Received sigquit from a child process. It usually means the child failed.",
    ],
    "a disk, or /dev/shm, is full": ["OSError: [Errno 28] No space left on device"],
    "ValueError: unheard of": [
        "Traceback (most recent call last):",
        '  File "engine.py", line 3, in main',
        "ValueError: unheard of",
        "INFO: bye",
    ],
    "something broke": ["E: not ours", "(Worker pid=3) ERROR 11-28 13:00:00 [x.py:1] something broke", "bye"],
}


@pytest.mark.parametrize("says", KNOWN_LINES)
def test_the_cause_is_found_above_whatever_the_engine_says_at_its_end(says: str) -> None:
    """Operators saw "exited with status 0" and twelve lines of shutdown; why stood 1,139 lines above."""
    lines = ["starting", *CHATTER[:50], *KNOWN_LINES[says], *CHATTER]
    cause = find(lines)
    assert cause is not None
    assert says in cause.text
    assert lines[cause.line] in KNOWN_LINES[says]


QUIET_LINES = [
    "(APIServer pid=28174) WARNING 11-28 13:59:08 [system_utils.py:255] Found ulimit of 20000 and failed to"
    " automatically increase. This can cause fd limit errors like `OSError: [Errno 24] Too many open files`.",
    "resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 2 leaked shared_memory objects",
    'INFO:     127.0.0.1:44720 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error',
    "--- l40sd: w-1 ended: exited, error: exit code 1, 2026-11-28T13:00:00+00:00",
    "simulated: stopping",
]


def test_what_calls_itself_no_error_is_none() -> None:
    """vLLM warns of "Too many open files" at each of its starts."""
    assert find(QUIET_LINES) is None
    assert find([]) is None


def test_what_a_run_survived_long_before_is_not_its_end() -> None:
    survived = ["RuntimeError: CUDA out of memory in one request"]
    quiet = ['INFO: "POST /v1/completions HTTP/1.1" 200 OK'] * (BURST_GAP_LINES + 1)
    assert find([*survived, *quiet, *RANK_DIED]) == find([""] * (1 + len(quiet)) + RANK_DIED)
    near = find([*survived, *quiet[: BURST_GAP_LINES - 2], *RANK_DIED])
    assert near is not None
    assert near.line == 0


def test_the_first_that_explains_itself_is_taken_and_else_the_first_that_tells_of_a_death() -> None:
    echo = "ERROR 11-28 13:00:00 [core.py:900] EngineCore failed to start."
    assert find([echo]) == Cause(says="its core did not come up", line=0)
    raised = "ERROR 11-28 13:00:00 [core.py:900] KeyError: 'weights'"
    assert find([echo, raised]) == Cause(says="KeyError: 'weights'", line=1)
    both = find([echo, raised, "OSError: [Errno 28] No space left on device"])
    assert both is not None
    assert both.line == 2


LINES = [f"line {n}" for n in range(100)]


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (None, LINES[-12:]),
        (Cause(says="", line=95), LINES[-12:]),
        (Cause(says="", line=88), LINES[-12:]),
        (Cause(says="", line=10), [*LINES[10:13], "... 79 lines ...", *LINES[-8:]]),
        (Cause(says="", line=87), [*LINES[87:90], "... 2 lines ...", *LINES[-8:]]),
    ],
)
def test_the_lines_shown_hold_the_cause(cause: Cause | None, expected: Sequence[str]) -> None:
    assert shown(LINES, cause, 12) == tuple(expected)
    assert shown([], None, 12) == ()
