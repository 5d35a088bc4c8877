"""Who lives on whose GPUs, asked of the kernel: what a status claims is not taken on trust."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from l40sd.shim import INSTANCE_VARIABLE, RUNTIME_VARIABLE, proc

GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Living:
    """A process of a worker: its shim (which has no GPUs), its engine or one of the engine's children."""

    pid: int
    start_ticks: int
    parent: int
    instance: str
    gpus: frozenset[str]

    @property
    def is_shim(self) -> bool:
        """Whether it only watches: no GPU is in its environment."""
        return not self.gpus

    def lives(self) -> bool:
        """Whether it is still there, and still itself."""
        now = proc.read_process(self.pid)
        return now is not None and now.is_alive and now.start_ticks == self.start_ticks


def living(runtime_dir: Path) -> list[Living]:
    """Return the living processes that carry the mark of an instance of this runtime directory."""
    found = []
    for process in proc.all_processes():
        environ = _environ(process.pid)
        if process.is_alive and environ.get(RUNTIME_VARIABLE) == str(runtime_dir):
            gpus = frozenset(filter(None, environ.get(GPUS_VARIABLE, "").split(",")))
            found.append(
                Living(
                    pid=process.pid,
                    start_ticks=process.start_ticks,
                    parent=process.parent,
                    instance=environ.get(INSTANCE_VARIABLE, ""),
                    gpus=gpus,
                )
            )
    return found


def doubly_owned(processes: Iterable[Living]) -> list[str]:
    """Return a sentence for each GPU that two instances have at one moment.

    The list was read one process after the other, so an instance in it may have ended before the next began:
    only those that live still, after the last was seen, have lived at the same time.
    """
    owners: dict[str, list[Living]] = {}
    for process in processes:
        for gpu in process.gpus:
            owners.setdefault(gpu, []).append(process)
    sentences = []
    for gpu, holders in owners.items():
        if len({holder.instance for holder in holders}) > 1:
            still = [holder for holder in holders if holder.lives()]
            if len({holder.instance for holder in still}) > 1:
                sentences.append(f"{gpu} has two owners: {', '.join(sorted(f'{h.instance} ({h.pid})' for h in still))}")
    return sentences


def _environ(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace")
        return dict(part.partition("=")[::2] for part in text.split("\0"))
    return {}
