"""The fingerprints of requests that workers died of: bounded, for minutes, empty as a rule.

Hashing a body costs; it is done only when a worker has failed the request, and for a new request only when the table
has one of the same length.
"""

import hashlib
import secrets
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from l40sd.proxy.poison import Death, is_poison
from l40sd.proxy.retry_policy import DEATHS_LIMIT
from l40sd.routing.routes import Route

Fingerprint = bytes
ENDS_LIMIT = 64
"""Ends of workers beyond which those are looked for that no fingerprint is known of any more."""


@dataclass(slots=True)
class End:
    """The end of one route's worker, as far as requests saw it.

    Attributes:
        serial: The route's at that time: with another one it is open anew.
        victims: Requests that it had not answered a byte of.
    """

    route: Route
    serial: int
    at_s: float
    victims: int = 0

    def death(self, now_s: float) -> Death:
        """Return it as it is to be judged."""
        has_left = not self.route.is_open or self.route.serial != self.serial
        return Death(has_left=has_left, age_s=now_s - self.at_s, victims=self.victims)


@dataclass(slots=True)
class Entry:
    """One fingerprint."""

    length: int
    until_s: float
    ends: list[End] = field(default_factory=list)

    def is_poison(self, now_s: float) -> bool:
        """Return whether its request is refused."""
        return is_poison(end.death(now_s) for end in self.ends)

    def workers(self, now_s: float) -> tuple[str, ...]:
        """Return those that ended with it, the latest last."""
        return tuple(end.route.backend.worker for end in self.ends if end.death(now_s).counts)


class Poison:
    """The table; changed by the requests that failed.

    Args:
        limit: Fingerprints kept; beyond it the oldest goes.
        kept_s: For how long, from the latest death on; 0: none is kept.

    Attributes:
        lengths: Of the bodies in the table, each with how many there are: one of another length need not be hashed.
    """

    def __init__(self, *, limit: int, kept_s: float) -> None:
        self._entries: OrderedDict[Fingerprint, Entry] = OrderedDict()  # the latest death last
        self.lengths: Counter[int] = Counter()
        self._latest: dict[Route, End] = {}
        self._secret = secrets.token_bytes(32)
        self.configure(limit=limit, kept_s=kept_s)

    def configure(self, *, limit: int, kept_s: float) -> None:
        """Change the bounds."""
        self._limit, self._kept_s = limit, kept_s
        while len(self._entries) > limit:
            self._drop(next(iter(self._entries)))

    def fingerprint(self, target: bytes, body: bytes | memoryview) -> Fingerprint:
        """Return a request's fingerprint; equal bytes to the same target have the same, in this process only."""
        digest = hashlib.blake2b(target, digest_size=16, key=self._secret)
        digest.update(b"\0")
        digest.update(body)
        return digest.digest()

    def note(self, fingerprint: Fingerprint, length: int, route: Route, now_s: float) -> End:
        """Count an end of this route's worker against a request that it had not answered a byte of; return that end."""
        end = self._latest.get(route)
        if end is None or end.serial != route.serial:
            end = self._latest[route] = End(route, route.serial, now_s)
        end.victims += 1
        if self._kept_s <= 0 or self._limit <= 0:
            return end
        entry = self._entries.pop(fingerprint, None)
        if entry is None:
            entry = Entry(length, 0.0)
            self.lengths[length] += 1
        entry.until_s = now_s + self._kept_s
        if end not in entry.ends:
            entry.ends = [*entry.ends, end][-2 * DEATHS_LIMIT :]
        self._entries[fingerprint] = entry
        while len(self._entries) > self._limit:
            self._drop(next(iter(self._entries)))
        return end

    def forget(self, fingerprint: Fingerprint) -> None:
        """Take a request off the table that was answered after all."""
        if fingerprint in self._entries:
            self._drop(fingerprint)

    def known(self, fingerprint: Fingerprint) -> Entry | None:
        """Return what is known of a request; None: nothing."""
        return self._entries.get(fingerprint)

    def sweep(self, now_s: float) -> None:
        """Forget what is too old, and the ends of routes that nothing is known of any more."""
        while self._entries and next(iter(self._entries.values())).until_s <= now_s:
            self._drop(next(iter(self._entries)))
        if len(self._latest) > ENDS_LIMIT or not self._entries:
            known = {id(end) for entry in self._entries.values() for end in entry.ends}
            self._latest = {route: end for route, end in self._latest.items() if id(end) in known}

    def _drop(self, fingerprint: Fingerprint) -> None:
        entry = self._entries.pop(fingerprint)
        self.lengths[entry.length] -= 1
        if not self.lengths[entry.length]:
            del self.lengths[entry.length]
