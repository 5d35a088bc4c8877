"""Which web pages may use the endpoint from a browser: what a reply says of it, and what is refused.

A browser lets a page read a reply from another origin only where the reply names that origin. Most requests it asks
about first (preflight, OPTIONS); a "simple" one, such as a POST of ``text/plain``, it just sends, and only keeps the
answer from the page: an engine that reads any body as JSON would work for whatever page its user has open.

Sources: the Fetch standard, "CORS protocol" and "CORS-safelisted request-header".
"""

import re

from l40sd.config.origins import EVERYBODY
from l40sd.proxy.refused import Refused

MAX_AGE_S = 600
EXPOSED = b"x-request-id, x-l40s-worker, x-l40s-source, retry-after"
SIMPLE_TYPES = (b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data")

_names = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?:[ \t]*,[ \t]*[!#$%&'*+\-.^_`|~0-9A-Za-z]+)*").fullmatch


class Cors:
    """The origins that are allowed.

    Args:
        origins: As browsers send them, or ``*`` for every one; one at least.
    """

    __slots__ = ("_every_reply", "_is_open", "_origins")

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._is_open = EVERYBODY in origins
        self._origins = frozenset(origin.encode() for origin in origins)
        self._every_reply = b"" if self._is_open else b"\r\nvary: Origin"

    def allows(self, origin: bytes) -> bool:
        """Return whether a page of this origin may use the endpoint."""
        return self._is_open or origin in self._origins

    def reply_fields(self, origin: bytes) -> bytes:
        """Return what every reply says, errors too, each as ``CR LF name: value``; empty ``origin``: no page asked."""
        if not origin or not self.allows(origin):
            return self._every_reply
        allowed = b"*" if self._is_open else origin
        fields = b"\r\naccess-control-allow-origin: %b\r\naccess-control-expose-headers: %b"
        return fields % (allowed, EXPOSED) + self._every_reply

    def check_preflight(self, origin: bytes) -> None:
        """Let a browser's question pass, or not.

        Raises:
            Refused: 403.
        """
        if not self.allows(origin):
            raise _refused(origin)

    def check_simple(self, origin: bytes, method: bytes, content_type: bytes) -> None:
        """Let a request pass unless it is one that a browser sends for any page without asking first.

        Raises:
            Refused: 403.
        """
        is_simple = method == b"POST" and content_type.partition(b";")[0].strip().lower() in SIMPLE_TYPES
        if origin and is_simple and not self.allows(origin):
            raise _refused(origin)


def preflight_fields(methods: tuple[bytes, ...], asked_for: bytes) -> bytes:
    """Return what the answer to an allowed preflight says, each as ``name: value CR LF``.

    Args:
        methods: Those of the path.
        asked_for: Names of the fields that the page wants to send; they may all be sent.
    """
    names = b"access-control-allow-headers: %b\r\n" % asked_for if _names(asked_for) else b""
    age = b"access-control-max-age: %d\r\n" % MAX_AGE_S
    return b"access-control-allow-methods: %b\r\n" % b", ".join(methods) + names + age


def _refused(origin: bytes) -> Refused:
    name = origin[:100].decode("ascii", "backslashreplace")
    return Refused(403, "origin_not_allowed", f"pages of {name} may not use this endpoint: [proxy] cors_origins")
