"""A small engine on real GPUs, started by torchrun: memory taken on each, and an all-reduce over all for each token.

It speaks as much of OpenAI's API as the load asks for. ``GET /v1/models`` says which GPU each rank has, by its UUID.
"""

import argparse
import json
import os
import queue
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist

STEP, LEAVE = 1, 0
WIDTH = 4096


class Group:
    """The ranks of this replica; used by one thread of each rank."""

    def __init__(self, memory_gib: float) -> None:
        self.rank = int(os.environ["RANK"])
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        self.held = torch.zeros(int(memory_gib * (1 << 30)), dtype=torch.uint8, device="cuda")
        self.value = torch.ones(WIDTH, device="cuda")
        self.command = torch.zeros(1, dtype=torch.int64, device="cuda")
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
        self.uuids: list[str] = found

    def step(self) -> None:
        """Make one token: every rank adds its share."""
        self.tell(STEP)
        self._add_up()

    def tell(self, command: int) -> None:
        """Say to the other ranks what comes next."""
        self.command.fill_(command)
        dist.broadcast(self.command, 0)

    def follow(self) -> None:
        """Do what rank 0 says until it says to leave."""
        while True:
            dist.broadcast(self.command, 0)
            if self.command.item() == LEAVE:
                return
            self._add_up()

    def _add_up(self) -> None:
        self.value.fill_(1.0)
        dist.all_reduce(self.value)
        if self.value[0].item() != dist.get_world_size():
            raise RuntimeError(f"the ranks add up to {self.value[0].item()}")


class Handler(BaseHTTPRequestHandler):
    """One client's connection to rank 0."""

    protocol_version = "HTTP/1.1"
    wishes: "queue.Queue[threading.Event]"
    uuids: list[str]
    model: str

    def do_GET(self) -> None:
        """Say how it is, or what it is."""
        if self.path == "/health":
            self._answer({"status": "ok"})
        else:
            self._answer({"object": "list", "data": [{"id": self.model, "object": "model", "gpus": self.uuids}]})

    def do_POST(self) -> None:
        """Make as many tokens as were asked for."""
        wish = json.loads(self.rfile.read(int(self.headers["content-length"])))
        tokens = wish.get("max_tokens", 1)
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
        whole = {"id": f"t-{id(self):x}-{threading.get_ident():x}", "object": "chat.completion", "model": self.model}
        if not wish.get("stream"):
            for _ in range(tokens):
                self._token()
            message = {"role": "assistant", "content": "one " * tokens}
            choice = {"index": 0, "message": message, "finish_reason": "length"}
            self._answer({**whole, "choices": [choice], "usage": usage})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(tokens):
            self._token()
            finish = "length" if number == tokens - 1 else None
            choice = {"index": 0, "delta": {"content": "one "}, "finish_reason": finish}
            self._event({**whole, "choices": [choice], "usage": usage if finish else None})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the load would fill the log."""

    def _token(self) -> None:
        done = threading.Event()
        self.wishes.put(done)
        done.wait()

    def _event(self, data: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _answer(self, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", default="tensors")
    parser.add_argument("--memory-gib", type=float, default=4.0)
    options = parser.parse_args()
    group = Group(options.memory_gib)
    if group.rank:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun tells every rank; rank 0 says when to leave
        group.follow()
    else:
        serve(group, options.host, options.port, options.name)
    dist.destroy_process_group()


def serve(group: Group, host: str, port: int, name: str) -> None:
    """Answer requests; all collective calls are this thread's, one token after the other."""
    Handler.wishes, Handler.uuids, Handler.model = queue.Queue(), group.uuids, name
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not stop.is_set():
        try:
            done = Handler.wishes.get(timeout=0.05)
        except queue.Empty:
            continue
        group.step()
        done.set()
    group.tell(LEAVE)


if __name__ == "__main__":
    main()
