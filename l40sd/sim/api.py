"""The simulated engine's API: requests, tokens and counters, and the faults that strike them."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from l40sd.sim.faults import Faults
from l40sd.sim.wire import Reply, Request, read_request

DEFAULT_TOKENS = 16
BREAKS = ("half-response", "half-event", "bad-chunk", "reset")
"""Faults that break a reply. A request may bring one along, ``"simulate": NAME``: it strikes this request whichever
worker has it and however often it is tried, and no other."""


class Api:
    """Answers requests. Its owner says when it is ready, and when open requests are to be aborted.

    Attributes:
        is_ready: Without it /health says 503.
        is_aborting: Open requests end at their next token with finish_reason "abort".
        is_hung: No token is made any more; everything else goes on.
        is_dead: What makes the tokens is gone, and the front says so until it ends, too.
        idle: Set while there is no request.
    """

    def __init__(
        self,
        models: Sequence[str],
        faults: Faults,
        *,
        api_key: str,
        max_model_len: int,
        slots: int,
        tokens_per_s: float,
        keep_alive_s: float,
        ranks: Collection[int],
        take: Callable[[str], None],
        die: Callable[[str, int], None],
    ) -> None:
        self._models = models
        self._faults = faults
        self._api_key = api_key
        self._max_model_len = max_model_len
        self._slots = asyncio.Semaphore(slots)
        self._tokens_per_s = tokens_per_s
        self._keep_alive_s = keep_alive_s
        self._ranks = ranks
        self._take = take
        self._die = die
        self.is_ready = self.is_aborting = self.is_hung = self.is_dead = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._running = self._waiting = self._requests = self._tokens = self._cut = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests until it ends."""
        try:
            while request := await read_request(reader, writer, self._keep_alive_s):
                await self._answer(request, Reply(writer), reader)
                if writer.is_closing() or request.headers.get("connection", "").lower() == "close":
                    break
        except ConnectionError:
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(self, request: Request, reply: Reply, reader: asyncio.StreamReader) -> None:
        """Answer one request: 1. what needs no key, 2. the key, 3. the API."""
        match request.method, request.path:
            case "GET", "/health":
                await self._health(reply)
            case "GET", "/metrics":
                await asyncio.sleep(self._faults.get("slow-metrics") or 0)
                await reply.text(200, self._metrics())
            case "GET", "/sim/state":
                await reply.json(200, self._state())
            case "POST", "/sim/fault":
                await self._change_faults(request, reply)
            case _, path if path.startswith("/v1/") and self._key_is_missing(request):
                await reply.error(401, "wrong or missing API key", "invalid_api_key")
            case "GET", "/v1/models":
                length = {"max_model_len": self._max_model_len} if self._max_model_len else {}
                listed = [{"id": name, "object": "model", "owned_by": "simulated", **length} for name in self._models]
                await reply.json(200, {"object": "list", "data": listed})
            case "POST", "/v1/chat/completions" | "/v1/completions":
                await self._complete(request, reply, reader)
            case _:
                await reply.error(404, f"nothing at {request.method} {request.path}", "not_found")

    def _key_is_missing(self, request: Request) -> bool:
        key = self._api_key
        return bool(key) and request.headers.get("authorization") != f"Bearer {key}"

    async def _health(self, reply: Reply) -> None:
        await asyncio.sleep(self._faults.get("slow-health") or 0)
        if self.is_ready and self._faults.get("unavailable") is None and not self.is_dead:
            await reply.json(200, {"status": "ok"})
        else:
            await reply.error(503, "loading model", "unavailable")

    def _metrics(self) -> str:
        counts = {"requests_running": self._running, "requests_waiting": self._waiting, "tokens_total": self._tokens}
        label = f'model="{self._models[0]}"'
        return "".join(f"simulated:{name}{{{label}}} {value}\n" for name, value in counts.items())

    def _state(self) -> dict[str, Any]:
        """Return what a test may want to know; ``cut`` counts requests whose client left before the end."""
        return {
            "pid": os.getpid(),
            "ranks": list(self._ranks),
            "argv": sys.argv[1:],
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "requests": self._requests,
            "running": self._running,
            "waiting": self._waiting,
            "tokens": self._tokens,
            "cut": self._cut,
        }

    async def _change_faults(self, request: Request, reply: Reply) -> None:
        try:
            for name, number in json.loads(request.body).items():
                self._faults.set(name, None if number is None else float(number))
                self._take(name)
        except (ValueError, AttributeError, TypeError) as error:
            await reply.error(400, str(error), "bad_fault")
        else:
            self.is_hung = self.is_hung and self._faults.get("hang-after") is not None
            await reply.json(200, {})

    async def _complete(self, request: Request, reply: Reply, reader: asyncio.StreamReader) -> None:
        """Answer a completion: 1. refuse what is wrong, 2. the faults that strike it, 3. wait for a slot, 4. count."""
        try:
            asked = json.loads(request.body)
            model, tokens, is_stream = asked["model"], _tokens_asked(asked), bool(asked.get("stream"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            await reply.error(400, f"bad request: {error}", "bad_request")
            return
        if model not in self._models:
            await reply.error(404, f"the model {model!r} does not exist", "model_not_found")
            return
        self._die_as_told(request)
        self._requests += 1
        if self._has_died():
            await reply.error(500, "EngineCore encountered an issue.", "EngineDeadError")
            return
        if self._faults.strikes("error") or (tokens > 1 and self._faults.strikes("error-but-one")):
            await reply.error(500, "failed, as told", "internal_error")
            return
        broken = next((name for name in BREAKS if asked.get("simulate") == name or self._faults.strikes(name)), "")
        shape = _Chat(model) if request.path.endswith("/chat/completions") else _Text(model)
        words = len(str(asked.get("messages") or asked.get("prompt") or "").split())
        try:
            async with self._slot():
                if is_stream:
                    wants_usage = bool((asked.get("stream_options") or {}).get("include_usage"))
                    await self._stream(reply, reader, shape, tokens, broken, words if wants_usage else None)
                else:
                    await self._whole(reply, reader, shape, tokens, broken, words)
        except ConnectionError:
            self._cut += 1
            raise

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self._waiting += 1
        self.idle.clear()
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._slots.release()
            if not self._running + self._waiting:
                self.idle.set()

    async def _stream(
        self, reply: Reply, reader: asyncio.StreamReader, shape: "_Text", limit: int, broken: str, words: int | None
    ) -> None:
        await reply.start()
        count = 0
        async for token in self._count(limit, reader):
            count += 1
            await reply.event(json.dumps(shape.part(token, None)))
            if broken and count == 2:
                await _break(reply, broken)
                return
        await reply.event(json.dumps(shape.part("", self._finish_reason(count, limit))))
        if words is not None:
            await reply.event(json.dumps({**shape.part("", None), "choices": [], "usage": _usage(words, count)}))
        await reply.event("[DONE]")
        await reply.end()

    async def _whole(
        self, reply: Reply, reader: asyncio.StreamReader, shape: "_Text", limit: int, broken: str, words: int
    ) -> None:
        text = [token async for token in self._count(limit, reader)]
        if broken == "half-response":
            await reply.half()
        elif broken:
            await reply.start()
            await _break(reply, broken)
        else:
            whole = shape.whole("".join(text), self._finish_reason(len(text), limit))
            await reply.json(200, {**whole, "usage": _usage(words, len(text))})

    async def _count(self, limit: int, reader: asyncio.StreamReader) -> AsyncIterator[str]:
        """Yield the tokens at their pace, until the limit or the abort.

        Raises:
            ConnectionError: The client has gone.
        """
        rate = self._tokens_per_s
        for number in range(1, limit + 1):
            await asyncio.sleep(1 / rate if rate else 0)
            while self._hangs() and not self.is_aborting:
                await asyncio.sleep(0.02)
                _check_client(reader)
            if self.is_aborting:
                return
            _check_client(reader)
            self._tokens += 1
            yield f" {number}"

    def _die_as_told(self, request: Request) -> None:
        crash_after = self._faults.get("crash-after")
        if crash_after is not None and self._requests >= crash_after:
            self._die(f"crashes after {self._requests} requests, as told", 1)
        poison = self._faults.get("poison")
        if poison is not None and b"poison" in request.body:
            self._die("read a poisoned request, as told", int(poison))

    def _has_died(self) -> bool:
        dead_for_s = self._faults.get("dead-core")
        if dead_for_s is not None and not self.is_dead:
            self.is_dead = True
            asyncio.get_running_loop().call_later(dead_for_s, self._die, "its core died, as told", 1)
        return self.is_dead

    def _hangs(self) -> bool:
        hang_after = self._faults.get("hang-after")
        self.is_hung = self.is_hung or (hang_after is not None and self._requests > hang_after)
        return self.is_hung

    def _finish_reason(self, count: int, limit: int) -> str:
        return "abort" if self.is_aborting and count < limit else "length"


class _Text:
    """OpenAI's older shape, ``/v1/completions``."""

    kind = "text_completion"

    def __init__(self, model: str) -> None:
        self._model = model

    def part(self, token: str, finish_reason: str | None) -> dict[str, Any]:
        return self._outer(self.kind, {"text": token}, finish_reason)

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        return self._outer(self.kind, {"text": text}, finish_reason)

    def _outer(self, kind: str, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None, **content}
        return {"id": "cmpl-simulated", "object": kind, "created": 0, "model": self._model, "choices": [choice]}


class _Chat(_Text):
    """OpenAI's shape of ``/v1/chat/completions``."""

    def part(self, token: str, finish_reason: str | None) -> dict[str, Any]:
        delta = {"role": "assistant", "content": token} if token else {}
        return self._outer("chat.completion.chunk", {"delta": delta}, finish_reason)

    def whole(self, text: str, finish_reason: str) -> dict[str, Any]:
        return self._outer("chat.completion", {"message": {"role": "assistant", "content": text}}, finish_reason)


def _tokens_asked(asked: dict[str, Any]) -> int:
    return int(asked.get("max_completion_tokens") or asked.get("max_tokens") or DEFAULT_TOKENS)


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _check_client(reader: asyncio.StreamReader) -> None:
    if reader.at_eof():
        raise ConnectionResetError("the client has gone")


async def _break(reply: Reply, how: str) -> None:
    """End a stream that has begun as it should not end."""
    match how:
        case "bad-chunk":
            await reply.bad_chunk()
            reply.leave()
        case "half-event":
            await reply.half_event()
            reply.leave()
        case "reset":
            reply.reset()
        case _:
            reply.leave()
