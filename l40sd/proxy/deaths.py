"""The workers that ended with one request: what it takes along from try to try, and what is told to the table."""

from dataclasses import dataclass

from l40sd.proxy.poison_table import End, Entry, Fingerprint, Poison
from l40sd.routing.routes import Lease, Routes


@dataclass(frozen=True, slots=True, kw_only=True)
class Deaths:
    """Ends of workers that had a request and had not answered a byte of it.

    Attributes:
        workers: Whose, the latest last.
        fingerprint: The request's; empty until one is needed.
        earlier: The latest of the ends; None: none is known here.
    """

    workers: tuple[str, ...] = ()
    fingerprint: Fingerprint = b""
    earlier: End | None = None


NONE_DIED = Deaths()
"""What nearly every request has."""


def deaths_known(poison: Poison, target: bytes, body: memoryview, now_s: float) -> tuple[Deaths, Entry] | None:
    """Return the ends that the table has of a request like this one, and its entry; None: it is not known."""
    if len(body) not in poison.lengths:
        return None
    fingerprint = poison.fingerprint(target, body)
    entry = poison.known(fingerprint)
    if entry is None:
        return None
    return Deaths(workers=entry.workers(now_s), fingerprint=fingerprint, earlier=entry.ends[-1]), entry


def with_one_more(
    deaths: Deaths, lease: Lease, target: bytes, body: memoryview, *, poison: Poison, routes: Routes, now_s: float
) -> Deaths:
    """Count the end of a leased worker that had not answered a byte: the request may be its cause.

    Args:
        deaths: What is known of the request so far.
        lease: Of the worker.
        target: What it was asked for.
        body: Of the request.
        poison: Is told.
        routes: Are told that the earlier worker may be excused.
        now_s: The loop's clock.
    """
    route = lease.route
    fingerprint = deaths.fingerprint or poison.fingerprint(target, body)
    end = poison.note(fingerprint, len(body), route, now_s)
    if deaths.earlier is not None:
        routes.excuse(route.backend.worker, deaths.earlier.route, deaths.earlier.serial, now_s)
    return Deaths(workers=(*deaths.workers, route.backend.worker), fingerprint=fingerprint, earlier=end)
