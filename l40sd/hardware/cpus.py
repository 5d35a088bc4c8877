"""The kernel's way of writing sets of CPUs and NUMA nodes, and which of them belong together."""

from collections.abc import Iterable, Iterator, Sequence

from l40sd.errors import L40sError

CPU_LIMIT = 1 << 16
"""Above any kernel's NR_CPUS (8192); keeps ``0-4000000000`` from filling the memory."""


def parse_cpu_list(text: str) -> frozenset[int]:
    """Return the logical CPUs named by a kernel CPU list.

    Args:
        text: Comma-separated ids and inclusive ranges, e.g. ``"0-3,8"``; may be empty (a NUMA node with
            memory but no cores) and may end in a newline.

    Returns:
        Logical CPU ids, as in ``/sys/devices/system/cpu/cpuN``.

    Raises:
        L40sError: A part is neither an id nor an ascending range, or is beyond ``CPU_LIMIT``.

    Source: "List format" in cpuset(7).
    """
    text = text.strip()
    return frozenset(cpu for part in text.split(",") for cpu in _parse_part(part)) if text else frozenset()


def format_cpu_list(cpus: Iterable[int]) -> str:
    """Return the shortest kernel CPU list for these ids; empty for none."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in _runs(sorted(set(cpus))))


def cores_of(cpus: frozenset[int]) -> tuple[frozenset[int], ...]:
    """Return physical cores guessed from a NUMA node's CPU list alone, in order of their lowest CPU.

    Linux on x86 numbers the first hardware thread of every core before the second ones, so a node's list of two
    ranges of one length (``0-31,64-95``) is its cores and their siblings in the same order. Any other list says
    nothing about threads: each CPU then counts as a core.
    """
    runs = list(_runs(sorted(cpus)))
    if len(runs) == 2 and runs[0][1] - runs[0][0] == runs[1][1] - runs[1][0]:
        apart = runs[1][0] - runs[0][0]
        return tuple(frozenset((cpu, cpu + apart)) for cpu in range(runs[0][0], runs[0][1] + 1))
    return tuple(frozenset((cpu,)) for cpu in sorted(cpus))


def _runs(ordered: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last of every unbroken run."""
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or ordered[end] != ordered[end - 1] + 1:
            yield ordered[start], ordered[end - 1]
            start = end


def _parse_part(part: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not _is_id(first) or (dash and not _is_id(last)) or int(last or first) < int(first):
        raise L40sError(
            f"{part.strip()!r} is neither a CPU nor an ascending range of CPUs below {CPU_LIMIT}",
            hint="a CPU list looks like 0-31,64-95",
            code="bad_cpu_list",
        )
    return range(int(first), int(last or first) + 1)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) < CPU_LIMIT
