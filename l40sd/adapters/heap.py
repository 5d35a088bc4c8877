"""The C library's heap, told what a proxy does with it."""

import ctypes

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 16 << 20
OWN_MAPPING_BYTES = 1 << 20


def keep_freed_memory() -> bool:
    """Let freed memory stay in the process up to 16 MiB, and only larger pieces than 1 MiB go back at once.

    A request body of 128 KiB is at the heap's end when it is freed; glibc then gives its pages back and faults them in
    again for the next one: 18 page faults a request, a third of its cost. Nothing happens on other C libraries.

    Returns:
        Whether the C library took it. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
