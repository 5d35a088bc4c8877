"""How a worker's latest run ended: for people, and for the next daemon."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LastEnd:
    """How a worker's latest run ended that has ended.

    Attributes:
        why: What it was stopped for, or ended for; empty when nothing says more than ``how``.
        how: As the kernel saw it, e.g. ``exited with status 1``.
        at: Wall clock, ISO 8601 with offset.
        ran_s: 0 when nobody saw it.
    """

    how: str
    why: str = ""
    at: str = ""
    ran_s: float = 0.0
    instance: str = ""
