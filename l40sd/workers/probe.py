"""One HTTP question to a worker: one answer, one deadline, at most 1 MiB. The only user of aiohttp's client.

Nothing here raises for what a worker does: whatever comes back, or fails to, is a ProbeResult that names it. Every
question opens its own connection, because what is asked is also whether the port still takes one.
"""

import asyncio
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import aiohttp

from l40sd.engines.table import Probes
from l40sd.model import ListedModel
from l40sd.workers.health import REFUSED, TIMEOUT, Counters, ProbeResult

__all__ = ["ANSWER_LIMIT_BYTES", "Counters", "ProbeResult", "Prober", "sum_metrics"]

OWNER_LIMIT = 100  # characters
ANSWER_LIMIT_BYTES = 1 << 20
"""An answer longer than this is an error; vLLM's metrics, the longest known, are about a tenth of it."""


class Prober:
    """Asks workers how they are. Needs a running loop; ``close`` it in the end.

    Every ``timeout_s`` covers the whole question, from connecting to the last byte read.
    """

    def __init__(self) -> None:
        # Proxies named in the environment are not asked for the way to our own workers (aiohttp's default).
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    async def health(self, host: str, port: int, probes: Probes, api_key: str, timeout_s: float) -> ProbeResult:
        """Return whether the worker says that it can serve."""
        result, _ = await self._ask(
            "GET", host, port, probes.health_path, api_key, max(timeout_s, probes.health_timeout_s)
        )
        return result

    async def models(
        self, host: str, port: int, probes: Probes, api_key: str, timeout_s: float
    ) -> tuple[ProbeResult, tuple[ListedModel, ...]]:
        """Return how it answered, and the models that it serves, aliases too where it lists them."""
        result, body = await self._ask("GET", host, port, probes.models_path, api_key, timeout_s)
        listed = _json(body).get("data") if result.ok else None
        if not isinstance(listed, list):
            return result, ()
        return result, tuple(_listed(model) for model in listed if isinstance(model, dict) and "id" in model)

    async def one_token(
        self, host: str, port: int, probes: Probes, api_key: str, model: str, timeout_s: float
    ) -> ProbeResult:
        """Return whether the worker made one token; a reply that was cut short by it (``abort``) is none."""
        question = {"model": model, "max_tokens": 1, "temperature": 0, "stream": False}
        if probes.token_path.endswith("/chat/completions"):
            question["messages"] = [{"role": "user", "content": "1"}]
        else:
            question["prompt"] = "1"
        result, body = await self._ask("POST", host, port, probes.token_path, api_key, timeout_s, question)
        if not result.ok:
            return result
        choices = _json(body).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return ProbeResult(ok=False, status=result.status, error="answer without a token")
        if choices[0].get("finish_reason") == "abort":
            return ProbeResult(ok=False, status=result.status, error="aborted")
        return result

    async def counters(self, host: str, port: int, probes: Probes, api_key: str, timeout_s: float) -> Counters | None:
        """Return the engine's own account of its work; None when it keeps none or did not give it."""
        wanted = {probes.running_metric, probes.waiting_metric, *probes.tokens_metrics} - {""}
        if not probes.metrics_path or not wanted:
            return None
        key = api_key if probes.metrics_need_key else ""
        result, body = await self._ask("GET", host, port, probes.metrics_path, key, timeout_s)
        if not result.ok:
            return None
        sums = sum_metrics(body.decode("utf-8", "replace"), wanted)
        tokens = [sums[name] for name in probes.tokens_metrics if name in sums]
        return Counters(
            running=sums.get(probes.running_metric),
            waiting=sums.get(probes.waiting_metric),
            tokens=sum(tokens) if tokens else None,
        )

    async def loops_back(self, host: str, timeout_s: float) -> bool:
        """Return whether this host reaches itself at a worker's address, as it must to reach the worker."""
        try:
            async with asyncio.timeout(timeout_s):
                server = await asyncio.start_server(_hang_up, host, 0, backlog=1)
                async with server:
                    port: int = server.sockets[0].getsockname()[1]
                    _, writer = await asyncio.open_connection(host, port)
                    writer.close()
                    return True
        except (OSError, TimeoutError):
            return False

    async def close(self) -> None:
        """Close what is open; questions under way end with an error."""
        await self._session.close()

    async def _ask(
        self,
        method: str,
        host: str,
        port: int,
        path: str,
        api_key: str,
        timeout_s: float,
        question: Mapping[str, Any] | None = None,
    ) -> tuple[ProbeResult, bytes]:
        address = f"[{host}]" if ":" in host else host
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method, f"http://{address}:{port}{path}", json=question, headers=headers, allow_redirects=False
                ) as reply,
            ):
                body = await _read(reply)
                if len(body) > ANSWER_LIMIT_BYTES:
                    error = f"answer longer than {ANSWER_LIMIT_BYTES >> 20} MiB"
                    return ProbeResult(ok=False, status=reply.status, error=error), b""
                if reply.status != 200:
                    return ProbeResult(ok=False, status=reply.status, error=f"status {reply.status}"), body
                return ProbeResult(ok=True, status=200), body
        except TimeoutError:
            return ProbeResult(ok=False, error=TIMEOUT), b""
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            return ProbeResult(ok=False, error=REFUSED if refused else f"no connection: {error.os_error}"), b""
        except (aiohttp.ClientError, OSError, ValueError) as error:
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            return ProbeResult(ok=False, error=f"broken answer: {first_line[:120]}"), b""


async def _hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """Return the reply's body; of one that is too long, a little more than the limit."""
    body = bytearray()
    async for part in reply.content.iter_any():
        body += part
        if len(body) > ANSWER_LIMIT_BYTES:
            break
    return bytes(body)


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _listed(model: Mapping[str, Any]) -> ListedModel:
    owner, meta = model.get("owned_by"), model.get("meta")
    of_a_slot = meta.get("n_ctx") if isinstance(meta, Mapping) else None  # llama.cpp: what one request may have
    return ListedModel(
        id=str(model["id"]),
        created=_count(model.get("created")),
        owned_by=owner[:OWNER_LIMIT] if isinstance(owner, str) else "",
        max_model_len=_count(model.get("max_model_len")) or _count(of_a_slot),
    )


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return value if 0 < value < 1 << 53 else 0  # a whole number to JavaScript, too


_SAMPLE = re.compile(r'([A-Za-z_:][\w:]*)(?:\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})?\s+(\S+)')


def sum_metrics(text: str, names: Collection[str]) -> dict[str, float]:
    """Return each named metric's sum over its labels; what is not there, or not a finite number, is left out.

    Source: Prometheus text format 0.0.4, ``name{labels} value [timestamp]``; a label's value may hold anything.
    """
    sums: dict[str, float] = {}
    for line in text.split("\n"):
        sample = _SAMPLE.match(line)
        if sample is None or sample[1] not in names:
            continue
        try:
            value = float(sample[2])
        except ValueError:
            continue
        if math.isfinite(value):
            sums[sample[1]] = sums.get(sample[1], 0.0) + value
    return sums
