"""A steady load on an OpenAI-compatible endpoint, and a strict account of what came back.

    python -m loadkit --url http://127.0.0.1:8080 --model smollm2 --seconds 30

A number of lanes each keep one request open: lanes of streams and lanes of short requests, so that the
concurrency is steady whatever the answers take. Every request asks for an exact number of tokens, and ends
as one of three:

- answered: all of it. A stream has one id throughout, the tokens asked for, a finish_reason and ``[DONE]``.
- truncated: it began well (status 200) and something is missing.
- failed: anything else, a refused connection included.
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

EXAMPLES_KEPT = 10
TIMES_KEPT = 100_000


class TruncatedError(Exception):
    """The reply began well and is not whole; the text says what is missing."""


class RefusedError(Exception):
    """The reply was no 200; the text says what it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What to ask for. Lanes take the models in turn; ``tokens`` are exact, not limits."""

    url: str
    models: tuple[str, ...]
    streams: int = 6
    shorts: int = 4
    stream_tokens: int = 32
    short_tokens: int = 4
    timeout_s: float = 120.0
    api_key: str = ""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came back so far.

    Attributes:
        open: Requests that are waiting for their answer, or for the rest of it.
        by_worker: Whole answers of each worker (``x-l40s-worker``); ``truncated_on``: those that it did not finish.
        longest_silence_s: Between two parts of one stream; whoever sets it to 0 measures from then on.
        examples: The first few of what went wrong, in words.
    """

    answered: int = 0
    failed: int = 0
    truncated: int = 0
    tokens: int = 0
    open: int = 0
    by_worker: Counter[str] = field(default_factory=Counter)
    truncated_on: Counter[str] = field(default_factory=Counter)
    durations_s: list[float] = field(default_factory=list)
    longest_silence_s: float = 0.0
    examples: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Requests without their whole answer."""
        return self.failed + self.truncated

    def note(self, what: str) -> None:
        """Keep one example of what went wrong, up to a bound."""
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(what)

    def longest_s(self) -> float:
        """Return the duration of the slowest whole answer, in seconds; 0 before the first."""
        return max(self.durations_s, default=0.0)

    def summary(self) -> dict[str, Any]:
        """Return the account as plain data: counts, tokens, seconds, requests of each worker."""
        plain = asdict(self)
        times = sorted(plain.pop("durations_s"))
        plain |= {"by_worker": dict(sorted(self.by_worker.items())), "truncated_on": dict(self.truncated_on)}
        plain["median_s"] = round(times[len(times) // 2], 3) if times else None
        plain["longest_silence_s"] = round(self.longest_silence_s, 3)
        plain["longest_s"] = round(self.longest_s(), 3)
        return plain


@asynccontextmanager
async def load(mix: Mix) -> AsyncIterator[Tally]:
    """Keep the load on while the block runs; on leaving it, let every open request come to its end."""
    tally = Tally()
    stop = asyncio.Event()
    headers = {"authorization": f"Bearer {mix.api_key}"} if mix.api_key else {}
    try:
        async with (
            aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=mix.timeout_s),
                connector=aiohttp.TCPConnector(limit=0),
            ) as session,
            asyncio.TaskGroup() as lanes,
        ):
            for number in range(mix.streams + mix.shorts):
                lanes.create_task(_lane(session, mix, tally, stop, number))
            try:
                yield tally
            finally:
                stop.set()
    except BaseExceptionGroup as group:
        # What went wrong in the block comes out as itself, not as part of our lanes' group.
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


@dataclass(slots=True, kw_only=True)
class _Request:
    """One request of a lane; ``worker`` and ``tokens`` become known as the reply comes."""

    lane: int
    number: int
    model: str
    kind: str
    worker: str = "?"
    tokens: int = 0

    @property
    def label(self) -> str:
        """What it is, for the examples."""
        return f"{self.kind} {self.lane}.{self.number} of {self.model} on {self.worker}"

    def body(self, tokens: int) -> dict[str, Any]:
        """Return a request for exactly so many tokens: ``ignore_eos`` is what llama.cpp, vLLM and SGLang all take."""
        question = f"Lane {self.lane}, question {self.number}: what is a GPU?"
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
        }


async def _lane(session: aiohttp.ClientSession, mix: Mix, tally: Tally, stop: asyncio.Event, lane: int) -> None:
    """Ask, wait for the whole answer, ask again, until told to stop."""
    kind, ask = ("stream", _stream) if lane < mix.streams else ("short", _short)
    for number in itertools.count():
        if stop.is_set():
            return
        request = _Request(lane=lane, number=number, model=mix.models[lane % len(mix.models)], kind=kind)
        began_s = time.monotonic()
        tally.open += 1
        try:
            await ask(session, mix, request, tally)
        except (TruncatedError, aiohttp.ClientPayloadError, ConnectionResetError) as error:
            tally.truncated += 1
            tally.truncated_on[request.worker] += 1
            tally.note(f"{request.label}: truncated: {error!r}")
        except (RefusedError, aiohttp.ClientError, TimeoutError, ValueError) as error:
            tally.failed += 1
            tally.note(f"{request.label}: failed after {time.monotonic() - began_s:.1f} s: {error!r}")
            # An endpoint that is down answers at once: do not turn that into a busy loop.
            await _pause(stop, 0.2)
        else:
            tally.answered += 1
            tally.tokens += request.tokens
            tally.by_worker[request.worker] += 1
            if len(tally.durations_s) < TIMES_KEPT:
                tally.durations_s.append(time.monotonic() - began_s)
        finally:
            tally.open -= 1


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    """Return after so many seconds, or as soon as the load is to stop."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


async def _short(session: aiohttp.ClientSession, mix: Mix, request: _Request, _: Tally) -> None:
    """Ask for one whole reply.

    Raises:
        RefusedError: The status is not 200.
        TruncatedError: The reply is not what was asked for.
    """
    async with session.post(f"{mix.url}/v1/chat/completions", json=request.body(mix.short_tokens)) as reply:
        await _accept(reply, request)
        text = await reply.text()
        try:
            request.tokens = json.loads(text)["usage"]["completion_tokens"]
        except (ValueError, KeyError, TypeError) as error:
            raise TruncatedError(f"no usage in {text[:300]!r}") from error
        if request.tokens != mix.short_tokens:
            raise TruncatedError(f"{request.tokens} tokens of {mix.short_tokens}")


async def _stream(session: aiohttp.ClientSession, mix: Mix, request: _Request, tally: Tally) -> None:
    """Ask for a stream and read it to its end.

    Raises:
        RefusedError: The status is not 200.
        TruncatedError: The stream ended without all of its parts, or is spliced from two.
    """
    wish = {"stream": True, "stream_options": {"include_usage": True}}
    pieces, usage, finish, ended = 0, None, None, False
    ids: set[str] = set()
    async with session.post(f"{mix.url}/v1/chat/completions", json=request.body(mix.stream_tokens) | wish) as reply:
        await _accept(reply, request)
        heard_s = time.monotonic()
        async for line in reply.content:
            last_s, heard_s = heard_s, time.monotonic()
            tally.longest_silence_s = max(tally.longest_silence_s, heard_s - last_s)
            data = line.removeprefix(b"data: ").strip()
            if not line.startswith(b"data: "):
                continue
            if data == b"[DONE]":
                ended = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise TruncatedError(f"after {pieces} pieces: {chunk['error']}")
            ids.add(chunk["id"])
            usage = (chunk.get("usage") or {}).get("completion_tokens", usage)
            for choice in chunk["choices"]:
                pieces += bool(choice["delta"].get("content"))
                finish = choice.get("finish_reason") or finish
    # A token may be half a character and make no piece of its own: usage counts where there is one.
    request.tokens = pieces if usage is None else usage
    if not (ended and finish == "length" and request.tokens == mix.stream_tokens and len(ids) == 1):
        raise TruncatedError(
            f"{request.tokens} tokens of {mix.stream_tokens}, finish_reason {finish}, "
            f"{'' if ended else 'no '}[DONE], {len(ids)} ids"
        )


async def _accept(reply: aiohttp.ClientResponse, request: _Request) -> None:
    """Note who answers; a reply that is no 200 has failed."""
    request.worker = reply.headers.get("x-l40s-worker", "?")
    if reply.status != 200:
        raise RefusedError(f"{reply.status} {(await reply.text())[:300]}")


async def _run(mix: Mix, seconds: float) -> Tally:
    """Keep the load on for so many seconds; return the account."""
    async with load(mix) as tally:
        await asyncio.sleep(seconds)
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line of JSON; return 1 when anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m loadkit", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8080")
    add("--model", action="append", required=True, help="may be given several times")
    add("--seconds", type=float, default=10.0)
    add("--streams", type=int, default=6)
    add("--shorts", type=int, default=4)
    add("--stream-tokens", type=int, default=32)
    add("--short-tokens", type=int, default=4)
    add("--timeout", type=float, default=120.0, help="seconds for one request")
    add("--api-key", default="")
    given = parser.parse_args(argv)
    mix = Mix(
        url=given.url.rstrip("/"),
        models=tuple(given.model),
        streams=given.streams,
        shorts=given.shorts,
        stream_tokens=given.stream_tokens,
        short_tokens=given.short_tokens,
        timeout_s=given.timeout,
        api_key=given.api_key,
    )
    tally = asyncio.run(_run(mix, given.seconds))
    sys.stdout.write(json.dumps(tally.summary()) + "\n")
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
