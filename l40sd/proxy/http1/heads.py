"""HTTP/1.1 heads as bytes: what the proxy must know of them, and what it may pass on.

Strict where leniency is how requests are smuggled: one framing, one Host, no folded lines, no bare LF, no space
before a colon. Everything that is not special is passed on byte for byte and never becomes a Python object: one
regular expression checks a head, a second cuts the special fields out of it (2 us for a curl, 4 us for an SDK).

Source: RFC 9112 (framing), RFC 9110 section 7.6.1 (hop-by-hop fields).
"""

import re
from collections.abc import Callable, Collection

from l40sd.proxy.refused import Refused

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
REQUEST_ID_LIMIT = 128
LENGTH_DIGITS = 15
FIELDS_LIMIT = 256  # a browser sends 20, an SDK 15
CONNECTION_TOKENS_LIMIT = 16  # clients name one or two

_fields = rb"(?:" + TOKEN + rb"++:[^\x00-\x08\x0a-\x1f\x7f]*+\r\n)*+\r\n"
_request = re.compile(rb"([A-Z]{1,20}+) ([!-~]++) HTTP/1\.([01])\r\n" + _fields).fullmatch
_special_in_request = re.compile(
    rb"\r\n((?i:c(?:onnection|ontent-length)|host|authorization|t(?:ransfer-encoding|e|railer)|expect"
    rb"|x-(?:request-id|api-key|l40s-worker|l40s-source)|keep-alive|proxy-(?:connection|authorization|authenticate)"
    rb"|upgrade|origin)):[ \t]*+([^\r\n]*+)"
).split
_special_in_response = re.compile(
    rb"\r\n((?i:connection|keep-alive|proxy-(?:connection|authenticate|authorization)|t(?:e|railer)|upgrade"
    rb"|x-(?:request-id|l40s-(?:worker|source))|access-control-[!-9;-~]++)):[ \t]*+([^\r\n]*+)"
).split
_reserved_in_trailer = re.compile(
    rb"(?i:c(?:onnection|ontent-(?:length|encoding|type|range))|t(?:e|railer|ransfer-encoding)|host|keep-alive|upgrade"
    rb"|authorization|set-cookie|access-control-.*+|proxy-.*+|x-(?:request-id|l40s-.*+))"
).fullmatch
content_length_in = re.compile(rb"\r\n(?i:content-length):[ \t]*+([0-9]++)").search
_framing = re.compile(rb"\r\n(?i:content-length|transfer-encoding):").search
_event_stream = re.compile(rb"\r\n(?i:content-type:[ \t]*+text/event-stream)").search
_coding = re.compile(rb"\r\n(?i:transfer-encoding):([^\r\n]*+)").search
_content_type = re.compile(rb"\r\n(?i:content-type):[ \t]*+([^\r\n]*+)").search
_asked_method = re.compile(rb"\r\n(?i:access-control-request-method):").search
_asked_fields = re.compile(rb"\r\n(?i:access-control-request-headers):[ \t]*+([^\r\n]*+)").search
_request_id = re.compile(rb"[!-~]{1,%d}" % REQUEST_ID_LIMIT).fullmatch
_host = re.compile(rb"(?:\[[0-9A-Fa-f:.]++\]|[!$%&'()*+,\-.0-9;=A-Z_a-z~]*+)(?::[0-9]*+)?[ \t]*+").fullmatch
_absolute = re.compile(rb"https?://[^/?#]++", re.IGNORECASE).match


class RequestHead:
    """What the proxy must know of a request's head.

    Attributes:
        target: As sent; the absolute form is reduced to its path and query.
        content_length: -1 when the head does not say.
        credential: The client's key, from ``Authorization: Bearer`` or ``x-api-key``; empty when there is none.
        request_id: The client's own, if it is sound; empty otherwise.
        hosts: How many Host fields there are.
        hop_by_hop: Further fields that Connection names.
        origin: Of the web page that asks, for us alone: whether it may is not the engine's to say.
        fields: All other fields, each as ``CR LF name: value``.
    """

    __slots__ = (
        "_content_type",
        "content_length",
        "credential",
        "expects_continue",
        "fields",
        "hop_by_hop",
        "hosts",
        "is_chunked",
        "is_http10",
        "keep_alive",
        "method",
        "origin",
        "request_id",
        "target",
    )

    def __init__(self, method: bytes, target: bytes, *, is_http10: bool) -> None:
        self.method = method
        self.target = target
        self.is_http10 = is_http10
        self.keep_alive = not is_http10
        self.content_length = -1
        self.is_chunked = False
        self.expects_continue = False
        self.credential = b""
        self.request_id = b""
        self.origin = b""
        self.hosts = 0
        self.hop_by_hop: list[bytes] = []
        self.fields = b""
        self._content_type: bytes | None = None  # looked for once: a head may serve many requests (CachedRequestHead)

    @property
    def is_preflight(self) -> bool:
        """Whether a browser asks if a web page may send a request."""
        return self.method == b"OPTIONS" and bool(self.origin) and _asked_method(self.fields) is not None

    @property
    def asked_fields(self) -> bytes:
        """Names of the fields that a web page wants to send."""
        found = _asked_fields(self.fields)
        return found[1].rstrip() if found else b""

    @property
    def content_type(self) -> bytes:
        """The body's type, lower case only where the client wrote it so."""
        if self._content_type is None:
            found = _content_type(self.fields)
            self._content_type = found[1] if found else b""
        return self._content_type


def parse_request(head: bytes) -> RequestHead:
    """Return what a request's head says, hop-by-hop fields taken out.

    Args:
        head: From the request line to the empty line, both included.

    Raises:
        Refused: 400 for anything that two parsers could read differently, 417, 501 or 505 for what is not spoken here.
    """
    if head.count(b"\r\n") > FIELDS_LIMIT + 2:  # and the request line, and the empty one
        raise Refused(431, "head_too_large", f"the request's head has more than {FIELDS_LIMIT} fields")
    match = _request(head)
    if match is None:
        raise _explain(head)
    method, target, minor = match.groups()
    request = RequestHead(method, target, is_http10=minor == b"0")
    pieces = _special_in_request(head)
    for position in range(1, len(pieces), 3):
        handle = _HANDLERS.get(pieces[position].lower())
        if handle is not None:
            handle(request, pieces[position + 1])
    if request.hosts != 1 and (request.hosts or not request.is_http10):
        raise Refused(400, "bad_request", "a request has exactly one Host field")
    if request.is_chunked and (request.content_length >= 0 or request.is_http10):
        raise Refused(400, "bad_request", "a chunked request has no Content-Length and is not HTTP/1.0")
    if not target.startswith(b"/"):
        request.target = _path_of(method, target)
    request.fields = b"".join(pieces[0::3])[len(match[1]) + len(match[2]) + 10 : -4]
    if request.hop_by_hop:
        request.fields = _without(request.fields, request.hop_by_hop)
    return request


def plain_request(request: RequestHead, content_length: int = -1) -> bytes:
    """Return a request head that says the same as the one that was parsed, in the plainest form.

    Without 100-continue, which was answered, and without what is not passed on.

    Args:
        request: As ``parse_request`` returned it.
        content_length: Of the body; -1: it is in chunks.
    """
    lines = [
        b"%b %b HTTP/1.%b" % (request.method, request.target, b"0" if request.is_http10 else b"1"),
        b"\r\nhost: l40sd\r\nconnection: ",
        b"keep-alive" if request.keep_alive else b"close",
        request.fields,
        b"\r\nauthorization: Bearer " + request.credential if request.credential else b"",
        b"\r\nx-request-id: " + request.request_id if request.request_id else b"",
        b"\r\norigin: " + request.origin if request.origin else b"",
        b"\r\ntransfer-encoding: chunked" if content_length < 0 else b"\r\ncontent-length: %d" % content_length,
        b"\r\n\r\n",
    ]
    return b"".join(lines)


def format_request(
    request: RequestHead, target: bytes, request_id: bytes, content_length: int, worker_fields: bytes, body: bytes = b""
) -> bytes:
    """Return the head that a worker gets, and its body where that comes along.

    Args:
        request: The client's.
        target: Path and query to ask for.
        request_id: The client's or ours.
        content_length: Of the body as it will be sent.
        worker_fields: Host and key of the worker, each as ``CR LF name: value``.
        body: A small one, in one copy with the head; empty when it is sent on its own.
    """
    return b"%b %b HTTP/1.1%b%b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b" % (
        request.method,
        target,
        worker_fields,
        request.fields,
        request_id,
        content_length,
        body,
    )


class ResponseHead:
    """What the proxy must know of a response's head.

    Attributes:
        lines: Status line and all fields that are passed on, without the empty line.
        has_body: A 204 and a 304 have none, whatever they say.
        is_framed: Says where it ends; otherwise the connection's end is the response's.
    """

    __slots__ = ("_content_length", "has_body", "is_framed", "lines", "status")

    def __init__(self, status: int, lines: bytes) -> None:
        self.status = status
        self.lines = lines
        self.has_body = status not in (204, 304)
        self._content_length: int | None = None  # looked for once
        self.is_framed = not self.has_body or b"\r\ncontent-length:" in lines or _framing(lines) is not None

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return _event_stream(self.lines) is not None

    @property
    def content_length(self) -> int:
        """What it says of the body's length; -1 when it says nothing."""
        if self._content_length is None:
            found = content_length_in(self.lines)
            self._content_length = int(found[1]) if found else -1
        return self._content_length

    @property
    def is_chunked(self) -> bool:
        """Whether the body is in chunks."""
        found = _coding(self.lines)
        return found is not None and found[1].rstrip().lower().endswith(b"chunked")

    def without_framing(self) -> bytes:
        """Return the lines for a client that cannot read chunks."""
        return _without(self.lines, (b"transfer-encoding",))


def parse_response(head: bytes) -> ResponseHead:
    """Return what a worker's response head says, hop-by-hop fields, the proxy's own and those of CORS taken out.

    Framing fields stay, for the body is passed on as it is; a 204 has none (RFC 9110, 8.6). The version is ours: what a
    worker speaks is between it and us (RFC 9110, 2.5).

    Args:
        head: From the status line to the empty line, both included; one that llhttp found well-formed.

    Raises:
        ValueError: The status is none that ends a request.
    """
    status = int(head[9:12])
    if status < 200:
        raise ValueError(f"the status {status:03} ends no request")
    pieces = _special_in_response(head)
    lines = b"".join(pieces[0::3])[:-4] if len(pieces) > 1 else head[:-4]
    dropped = {b"content-length", b"transfer-encoding"} if status == 204 else set()
    for position in range(1, len(pieces), 3):
        if pieces[position].lower() == b"connection":
            dropped |= set(_tokens(pieces[position + 1])) - {
                *(b"close", b"keep-alive", b"content-length", b"transfer-encoding")
            }
    if dropped:
        lines = _without(lines, dropped)
    return ResponseHead(status, b"HTTP/1.1" + lines[8:])


def is_reserved_in_trailer(name: bytes) -> bool:
    """Return whether a field may not stand behind a body: it frames, routes or is ours (RFC 9110, 6.5.1)."""
    return _reserved_in_trailer(name) is not None


def _set_content_length(request: RequestHead, value: bytes) -> None:
    digits = value.rstrip()
    if request.content_length >= 0 or not digits.isdigit() or len(digits) > LENGTH_DIGITS:
        raise Refused(400, "bad_request", "Content-Length is one number, once")
    request.content_length = int(digits)


def _set_chunked(request: RequestHead, value: bytes) -> None:
    if request.is_chunked:
        raise Refused(400, "bad_request", "Transfer-Encoding may stand once")
    if value.strip().lower() != b"chunked":
        raise Refused(501, "not_implemented", "the only transfer coding understood is chunked")
    request.is_chunked = True


def _count_host(request: RequestHead, value: bytes) -> None:
    if not _host(value):
        raise Refused(400, "bad_request", "the Host field is not a host and a port")
    request.hosts += 1


def _set_credential(request: RequestHead, value: bytes) -> None:
    scheme, _, credential = value.partition(b" ")
    if scheme.lower() == b"bearer":
        request.credential = credential.strip()


def _set_api_key(request: RequestHead, value: bytes) -> None:
    request.credential = request.credential or value.strip()


def _set_origin(request: RequestHead, value: bytes) -> None:
    request.origin += (b", " if request.origin else b"") + value.rstrip()  # several are none that is allowed


def _set_request_id(request: RequestHead, value: bytes) -> None:
    if found := _request_id(value.rstrip()):
        request.request_id = found[0]


def _expect(request: RequestHead, value: bytes) -> None:
    if value.strip().lower() != b"100-continue":
        raise Refused(417, "expectation_failed", "the only expectation understood is 100-continue")
    request.expects_continue = not request.is_http10


def _set_connection(request: RequestHead, value: bytes) -> None:
    if value in (b"keep-alive", b"Keep-Alive"):
        return
    for token in _tokens(value):
        if token == b"close":
            request.keep_alive = False
        elif token != b"keep-alive":
            request.hop_by_hop.append(token)
    if len(request.hop_by_hop) > CONNECTION_TOKENS_LIMIT:
        raise Refused(400, "bad_request", f"Connection names more than {CONNECTION_TOKENS_LIMIT} fields")


_HANDLERS: dict[bytes, Callable[[RequestHead, bytes], None]] = {
    b"host": _count_host,
    b"content-length": _set_content_length,
    b"transfer-encoding": _set_chunked,
    b"connection": _set_connection,
    b"authorization": _set_credential,
    b"x-api-key": _set_api_key,
    b"x-request-id": _set_request_id,
    b"expect": _expect,
    b"origin": _set_origin,
}  # the other special fields are dropped and say nothing


def _tokens(value: bytes) -> list[bytes]:
    return [token for token in (part.strip().lower() for part in value.split(b",")) if token]


def _without(lines: bytes, names: Collection[bytes]) -> bytes:
    """Return the lines but for the fields of these names (lower case), in one pass whatever their number."""
    first, *fields = lines.split(b"\r\n")
    return b"\r\n".join([first, *(field for field in fields if field.partition(b":")[0].lower() not in names)])


def _path_of(method: bytes, target: bytes) -> bytes:
    """Return path and query of an absolute-form target; ``*`` stays.

    Raises:
        Refused: Neither; CONNECT's authority form among them.
    """
    if target == b"*" and method == b"OPTIONS":
        return target
    match = _absolute(target)
    if match is None:
        raise Refused(400, "bad_request", "the request target is neither a path nor a URL")
    path = target[match.end() :]
    return path if path.startswith(b"/") else b"/" + path


def _explain(head: bytes) -> Refused:
    line = head.partition(b"\r\n")[0]
    version = re.search(rb" HTTP/(\d)\.\d$", line)
    if version and version[1] != b"1":
        return Refused(505, "http_version_not_supported", "HTTP/1.1 is spoken here")
    return Refused(400, "bad_request", "this is not a well-formed HTTP/1.1 request head")
