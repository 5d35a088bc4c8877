"""What of a worker outlives the daemon that drove it: its failures, how often it was restarted, since when it is ready.

Times are those of ``clock.now_s``, which all processes of one boot share, so they go on counting from one daemon to the
next and the wall clock has no say in them. What was written in another boot is not read: the failures of a machine
that has been restarted since are nobody's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from l40sd.codec import plain, restore
from l40sd.model import WorkerId
from l40sd.workers.last_end import LastEnd
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.restart_policy import Record

TOLD = (Phase.READY, Phase.DRAINED, Phase.STOPPING, Phase.STUCK, Phase.BACKOFF, Phase.QUARANTINED)
"""Phases that the next daemon is told of. The first two it has to find confirmed; with the others it goes on. From any
other a worker is looked at afresh, FAILED too: the configuration is read anew, and whether it can be started now costs
nothing to find out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedWorker:
    """One worker, as the next daemon has to know it.

    Attributes:
        fingerprint: Of the launch that all of it is about; nothing is saved of another launch.
        phase: One of ``TOLD``; WAITING stands for all others.
        since_s: Since when it is in that phase.
        kind: What the failure is filed under that it is being stopped for; empty: for none.
        last_end: How its latest run ended that did.
        instance: Which run ``spawned_at_s`` and ``ready_at_s`` are about; empty while it has not been ready.
    """

    fingerprint: str
    phase: Phase = Phase.WAITING
    goal: Goal = Goal.SERVE
    since_s: float = 0.0
    reason: str = ""
    last_lines: tuple[str, ...] = ()
    kind: str = ""
    record: Record = field(default_factory=Record)
    restarts: int = 0
    failed_starts: int = 0
    instance: str = ""
    spawned_at_s: float = 0.0
    ready_at_s: float | None = None
    next_start_at_s: float | None = None
    last_end: LastEnd | None = None

    def of(self, instance: str) -> "SavedWorker":
        """Return it as it is for this run: of another run's life it says nothing, only of the failures before."""
        if self.instance == instance:
            return self
        return replace(self, phase=Phase.WAITING, goal=Goal.SERVE, kind="", instance="", ready_at_s=None)

    def ready_for_s(self, ran_s: float, now_s: float) -> float | None:
        """Return how long its run had been ready when it ended; None: it never was. ``ran_s`` 0: nobody knows when."""
        if self.ready_at_s is None:
            return None
        if ran_s == 0.0:
            return now_s - self.ready_at_s
        return max(0.0, ran_s - (self.ready_at_s - self.spawned_at_s))


def written(saved: Mapping[WorkerId, SavedWorker], boot_id: str, now_s: float) -> dict[str, Any]:
    """Return the part of the state file that this is."""
    return {"boot_id": boot_id, "now_s": now_s, "workers": plain(dict(saved))}


def read(stored: Any, boot_id: str, now_s: float) -> tuple[dict[WorkerId, SavedWorker], str]:
    """Return what ``written`` gave, and a note; nothing and no note for what another boot or an older l40sd wrote.

    A clock that is behind the one it was written with is another clock (a container that was moved): also nothing.
    """
    if not isinstance(stored, dict) or stored.get("boot_id") != boot_id:
        return {}, ""
    try:
        if restore(float, stored.get("now_s")) > now_s:
            return {}, ""
        return restore(dict[WorkerId, SavedWorker], stored.get("workers")), ""
    except msgspec.ValidationError as error:
        return {}, f"workers' failures before this start are not known: {error}"
