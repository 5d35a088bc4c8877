"""A control server on a real Unix socket that answers with what a test gives it, and remembers what it was asked."""

import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from l40sd.codec import encode
from l40sd.control.messages import ErrorBody

Reply = tuple[int, Any]
"""A status and what becomes the body: bytes as they are, an iterator of bytes as chunks, anything else as JSON."""
Answer = Reply | Callable[[], Reply]


def refusal(status: int, code: str, what: str, *, where: str = "", hint: str = "") -> Reply:
    """Return the reply with which the daemon refuses."""
    return status, {"error": ErrorBody(code=code, what=what, where=where, hint=hint)}


class FakeControl:
    """What the server answers, by ``"GET /v1/status"`` (the query is left out), and what it was asked.

    An answer that is a list is used up one by one; its last entry stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answers: dict[str, Answer | list[Answer]] = {}
        self.asked: list[tuple[str, bytes]] = []

    def reply_to(self, method: str, target: str, body: bytes) -> Reply:
        self.asked.append((f"{method} {target}", body))
        answer = self.answers.get(f"{method} {urlsplit(target).path}", refusal(404, "not_found", f"no {target}"))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return answer() if callable(answer) else answer


@contextmanager
def serving(path: Path, answers: Mapping[str, Any]) -> Iterator[FakeControl]:
    """Serve these answers on a Unix socket at ``path`` until the block ends."""
    fake = FakeControl(path)
    fake.answers.update(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, value = fake.reply_to(self.command, self.path, body)
            self.close_connection = True
            self.send_response(status)
            if isinstance(value, Iterator):
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for part in value:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
                return
            data = value if isinstance(value, bytes) else encode(value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - http.server's name

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that hangs up is no error of the test."""

    with Server(fake.path, Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join(10)
