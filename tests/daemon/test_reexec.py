"""What goes through an exec in place, and what of it another release can read."""

import os
import socket

import msgspec
import pytest

from l40sd.daemon import reexec
from l40sd.model import Backend, ModelName, WorkerId
from l40sd.proxy.handed import Handed, HandedConnection, HandedExchange, HandedReply


def exchange(upstream: int) -> HandedExchange:
    return HandedExchange(
        upstream=upstream,
        is_reused=True,
        backend=Backend(worker=WorkerId("w0"), model=ModelName("toy"), host="::1", port=30000, api_key="secret"),
        head=b"POST / HTTP/1.1\r\n\xff: \xfe\r\n\r\n",
        target=b"/v1/completions",
        body=bytes(range(256)),
        name="toy",
        model=ModelName("toy"),
        request_id=b"one",
        keep_alive=False,
        tries_left=2,
        started_at_s=1.5,
        asked_at_s=2.5,
        begun=b"",
        reply=HandedReply(status=200, lines=b"HTTP/1.1 200 OK", left_bytes=7, first_byte_at_s=3.5),
    )


@pytest.fixture
def ends() -> list[int]:
    return [end.detach() for end in (*socket.socketpair(), *socket.socketpair())]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def test_what_is_given_is_taken_once_and_nothing_else_inherits_it(ends: list[int]) -> None:
    client, upstream, lock, other = ends
    handed = Handed(
        paused_at_s=12.25,
        connections=(HandedConnection(client=client, held=b"GET ", exchange=exchange(upstream)),),
    )
    environ: dict[str, str] = {}
    reexec.give(lock, own=[], lent=[], environ=environ)
    reexec.give_connections(handed, environ)
    kept = int(environ["L40SD_HANDOVER"].partition(":")[0])
    file = int(environ["L40SD_HANDOVER_CONNECTIONS"])
    assert all(map(os.get_inheritable, (client, upstream, file, kept)))
    taken = reexec.take(environ)
    assert taken is not None
    assert (taken.connections, taken.problem) == (handed, "")
    assert environ == {}
    assert reexec.take(environ) is None
    assert not os.get_inheritable(client)
    assert not os.get_inheritable(upstream)
    assert not is_open(file)
    close(client, upstream, lock, other, kept)


@pytest.mark.parametrize("damage", ["version", "shape", "bytes"])
def test_connections_that_are_not_understood_are_closed_and_that_is_said(
    ends: list[int], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, upstream, lock, other = ends
    environ: dict[str, str] = {}
    reexec.give(lock, own=[], lent=[], environ=environ)
    if damage == "version":
        monkeypatch.setattr(reexec, "CONNECTIONS_VERSION", 99)
    handed = Handed(paused_at_s=1.0, connections=(HandedConnection(client=client, exchange=exchange(upstream)),))
    reexec.give_connections(handed, environ)
    monkeypatch.undo()
    file = int(environ["L40SD_HANDOVER_CONNECTIONS"])
    if damage == "shape":
        old = msgspec.msgpack.decode(os.pread(file, 1 << 20, 0))
        os.ftruncate(file, os.pwrite(file, msgspec.msgpack.encode(old | {"connections": {"paused_at_s": "late"}}), 0))
    if damage == "bytes":
        os.ftruncate(file, 10)
    taken = reexec.take(environ)
    assert taken is not None
    assert taken.connections is None
    assert ("99" if damage == "version" else "cannot be read") in taken.problem
    if damage == "bytes":  # which descriptors they are is not known either
        close(client, upstream)
    assert not is_open(client)
    assert not is_open(upstream)
    close(lock, other, taken.lock)
