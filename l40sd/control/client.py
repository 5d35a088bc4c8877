"""A small client of the control socket: HTTP/1.1 on a Unix socket, from the standard library, synchronous."""

import http.client
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from l40sd.codec import decode, encode
from l40sd.control.messages import ErrorBody, Event, LogPart
from l40sd.errors import L40sError

T = TypeVar("T")

DEFAULT_SOCKET = "/run/l40sd/control.sock"
REPLY_LIMIT_BYTES = 64 << 20

UNREACHABLE = "unreachable"
"""The error code of a daemon that does not answer, for whatever reason."""


def socket_path(asked: str | None, environ: Mapping[str, str]) -> str:
    """Return the control socket: 1. as asked on the command line, 2. $L40SD_SOCKET, 3. the usual place."""
    return asked or environ.get("L40SD_SOCKET") or DEFAULT_SOCKET


def worker_path(worker: str, action: str = "") -> str:
    """Return ``/v1/workers/{id}`` or ``/v1/workers/{id}/{action}``."""
    return f"/v1/workers/{quote(worker, safe='')}" + (f"/{action}" if action else "")


class Client:
    """Asks the daemon. Every call is one connection: a daemon that was restarted in between is no special case.

    Args:
        path: The control socket.
        timeout_s: Longest silence of the daemon within one call; a stream that follows has none.
    """

    def __init__(self, path: str, *, timeout_s: float = 30.0) -> None:
        self.path = path
        self.timeout_s = timeout_s

    def get(self, path: str, kind: type[T], **query: object) -> T:
        """Return the record at ``path``.

        Raises:
            L40sError: What the daemon says is wrong; code ``unreachable`` when it does not answer,
                ``bad_reply`` when its answer has another shape (a daemon of another version).
        """
        data = self._call("GET", path, query)
        return self._decoded(kind, data, path)

    def post(self, path: str, body: object = None) -> dict[str, Any]:
        """Send a request that changes something; return the reply's JSON object.

        Raises:
            L40sError: As ``get``.
        """
        return self.ask(path, body, dict[str, Any])

    def ask(self, path: str, body: object, kind: type[T]) -> T:
        """Post a request; return the reply as a record.

        Raises:
            L40sError: As ``get``.
        """
        data = self._call("POST", path, {}, encode({} if body is None else body))
        return self._decoded(kind, data or b"{}", path)

    def stream(self, path: str, **query: object) -> Iterator[bytes]:
        """Yield the reply's bytes as they come, until the daemon ends it.

        With ``follow=1`` in the query the daemon may be silent for as long as nothing happens: the reader's
        Ctrl-C is the only deadline.

        Raises:
            L40sError: As ``get``; also in the middle, when the daemon goes away.
        """
        with self._open("GET", path, query) as (connection, reply):
            if query.get("follow") and connection.sock is not None:
                connection.sock.settimeout(None)
            while data := reply.read1(65536):
                yield data

    def events(self, **query: object) -> Iterator[Event]:
        """Yield events as they come; see ``stream``."""
        return self._records("/v1/events", Event, query)

    def log(self, worker: str, **query: object) -> Iterator[LogPart]:
        """Yield a worker's output as it comes, each part with the position to go on from; see ``stream``."""
        return self._records(worker_path(worker, "logs"), LogPart, {**query, "follow": 1, "parts": 1})

    def _records(self, path: str, kind: type[T], query: Mapping[str, object]) -> Iterator[T]:
        rest = b""
        for data in self.stream(path, **query):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line:
                    yield self._decoded(kind, line, path)

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: bytes | None = None,
    ) -> bytes:
        with self._open(method, path, query, body) as (_, reply):
            data = reply.read(REPLY_LIMIT_BYTES + 1)
            if reply.length and len(data) <= REPLY_LIMIT_BYTES:  # read(n) says nothing of a cut-off body
                raise http.client.IncompleteRead(data, reply.length)
        if len(data) > REPLY_LIMIT_BYTES:
            raise L40sError(f"the daemon's answer to {path} is endless", where=self.path, code="bad_reply")
        return data

    def _decoded(self, kind: type[T], data: bytes, path: str) -> T:
        try:
            return decode(kind, data)
        except msgspec.MsgspecError as error:
            raise L40sError(
                f"the daemon's answer to {path} has another shape: {error}",
                where=self.path,
                hint="l40sctl version shows whether client and daemon differ",
                code="bad_reply",
            ) from error

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: bytes | None = None,
    ) -> Iterator[tuple[http.client.HTTPConnection, http.client.HTTPResponse]]:
        connection = _UnixConnection(self.path, self.timeout_s)
        target = path + (f"?{urlencode(query)}" if query else "")
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, target, body, headers)
            reply = connection.getresponse()
            if reply.status >= 400:
                raise _refusal(reply, path)
            yield connection, reply
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _unreachable(self, error: OSError | http.client.HTTPException) -> L40sError:
        """Return what the operator should know about a daemon that does not answer."""
        match error:
            case FileNotFoundError() | NotADirectoryError():
                what, hint = "no such socket: l40sd is not running", "systemctl status l40sd; or name it with --socket"
            case (
                http.client.RemoteDisconnected()
                | http.client.IncompleteRead()
                | ConnectionResetError()
                | BrokenPipeError()
            ):
                what, hint = "l40sd went away in the middle of its answer", "systemctl status l40sd"
            case ConnectionRefusedError():
                what, hint = "nobody listens: l40sd is not running", "systemctl status l40sd"
            case PermissionError():
                what, hint = f"not permitted for uid {os.geteuid()}", "sudo, or become a member of group l40sd"
            case TimeoutError():
                what, hint = f"no answer within {self.timeout_s:g} s", "systemctl status l40sd; journalctl -u l40sd"
            case _:
                what, hint = f"no answer: {str(error) or type(error).__name__}", "systemctl status l40sd"
        return L40sError(what, where=self.path, hint=hint, code=UNREACHABLE)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect to the Unix socket instead of to a TCP address."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(self._path)


def _refusal(reply: http.client.HTTPResponse, path: str) -> L40sError:
    data = reply.read(1 << 20)
    try:
        body = decode(dict[str, ErrorBody], data)["error"]
    except (msgspec.MsgspecError, KeyError):
        return L40sError(f"{reply.status} {reply.reason}", where=path, code=f"http_{reply.status}")
    return L40sError(body.what, where=body.where, hint=body.hint, code=body.code)
