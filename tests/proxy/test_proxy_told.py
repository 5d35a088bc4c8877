"""What the log says of requests that failed."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from proxykit import STREAM_HEAD, Conversation, Request, Stand, chunk, plain, post
from structlog.testing import capture_logs

from l40sd.model import WorkerId

StartStand = Callable[..., Awaitable[Stand]]
ASK = post(extra=b"X-Request-Id: r-17\r\n")


def failed(logs: list[Any]) -> list[Any]:
    return [event for event in logs if event["event"] == "proxy.request_failed"]


async def close(talk: Conversation, request: Request) -> None:
    talk.reset()


async def say_500(talk: Conversation, request: Request) -> None:
    await talk.send(plain(b"{}", status="500 Internal Server Error"))


async def stay_silent(talk: Conversation, request: Request) -> None:
    await talk.closed()


async def cut(talk: Conversation, request: Request) -> None:
    await talk.send(STREAM_HEAD + chunk(b"data: 1\n\n"))
    talk.writer.close()


@pytest.mark.parametrize(
    ("behave", "status", "tries", "why"),
    [
        (close, 502, 2, "ended with this request"),
        (say_500, 500, 1, "answered so"),
        (stay_silent, 504, 1, "did not begin to answer"),
        (cut, 200, 1, "cut: connection"),
    ],
)
async def test_a_failed_request_is_a_warning_that_says_what_there_is_to_know(
    stand: StartStand, behave: Any, status: int, tries: int, why: str
) -> None:
    """With the access log off, as it is by default, a request that failed left no trace at all."""
    s = await stand(workers=1, first_byte_timeout_s=0.2)
    s.worker.behave = behave
    with capture_logs() as logs:
        dialog = await s.dial()
        await dialog.send(ASK)
        await dialog.reader.read(100)
        await s.until(lambda: s.leases() == 0)
    (event,) = failed(logs)
    assert event["log_level"] == "warning"
    assert {key: event[key] for key in ("request", "model", "worker", "status", "tries", "path")} == {
        "request": "r-17",
        "model": "chat",
        "worker": "w0",
        "status": status,
        "tries": tries,
        "path": "/v1/chat/completions",
    }
    assert why in event["why"]
    assert event["duration_s"] >= 0
    assert "suppressed" not in event


async def test_one_that_no_worker_could_take_is_told_of_too(stand: StartStand) -> None:
    s = await stand(workers=0, queue_timeout_s=0.05)
    with capture_logs() as logs:
        assert (await s.ask(ASK)).status == 503
    (event,) = failed(logs)
    assert (event["request"], event["status"], event["worker"], event["tries"]) == ("r-17", 503, "", 0)
    assert "2 workers are loading" in event["why"]


async def test_a_connection_too_many_is_told_of(stand: StartStand) -> None:
    s = await stand(connection_limit=1)
    held = await s.dial()
    assert (await held.ask(post())).status == 200
    with capture_logs() as logs:
        assert (await s.ask(ASK)).status == 503
    (event,) = failed(logs)
    assert event["why"] == "too many connections"


async def test_what_a_client_did_wrong_or_gave_up_is_no_failure(stand: StartStand) -> None:
    s = await stand()
    with capture_logs() as logs:
        assert (await s.ask(post(b"{"))).status == 400
        assert (await s.ask(post(model="other"))).status == 404
        s.worker.behave = stay_silent
        dialog = await s.dial()
        await dialog.send(post())
        await s.until(lambda: s.leases() == 1)
        dialog.close()
        await s.until(lambda: s.leases() == 0)
    assert failed(logs) == []


async def test_a_storm_of_failures_is_counted_and_the_count_told(stand: StartStand) -> None:
    s = await stand(workers=1, failures_logged_per_minute=3)
    s.worker.behave = say_500
    with capture_logs() as logs:
        dialog = await s.dial()
        for _ in range(20):
            assert (await dialog.ask(post())).status == 500
        assert len(failed(logs)) == 3
        now_s = asyncio.get_running_loop().time()
        s.proxy._running.failures.sweep(now_s + 61)
    assert failed(logs)[-1]["suppressed"] == 17


async def test_with_the_access_log_each_request_is_one_line(stand: StartStand) -> None:
    s = await stand(workers=1, access_log=True)
    with capture_logs() as logs:
        assert (await s.ask(post())).status == 200
        s.routes.remove(WorkerId("w0"))
        s.routes.set_catalog({})
        assert (await s.ask(post())).status == 404
    assert [event["event"] for event in logs if "request" in event["event"]] == ["proxy.request"] * 2
