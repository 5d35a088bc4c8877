"""Which of the inherited listeners the configuration means."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from l40sd.daemon import reexec
from l40sd.proxy.listeners import address_of, take_over


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listener(stack: ExitStack, host: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return stack.enter_context(socket.create_server((host, 0), family=family))
    except OSError:
        pytest.skip(f"no {host} here")


def port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "written"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("::1", "[::1]"), ("::1", "[0:0::1]")]
)
def test_an_address_is_the_same_however_it_is_written(stack: ExitStack, host: str, written: str) -> None:
    """`localhost:8080` was bound a second time after an upgrade, and the daemon did not start."""
    own = listener(stack, host)
    assert take_over([f"{written}:{port(own)}"], lent=[], own=[own]) == ([], [own], [])


def test_any_port_is_what_is_left_once_the_others_are_found(stack: ExitStack) -> None:
    one, two = listener(stack), listener(stack)
    listen = ["127.0.0.1:0", address_of(one)]
    assert take_over(listen, lent=[], own=[one, two]) == ([], [one, two], [])
    assert take_over([*listen, "127.0.0.1:0"], lent=[], own=[one, two]) == ([], [one, two], [])


def test_what_is_not_meant_is_closed_if_it_is_ours_and_kept_if_it_is_lent(stack: ExitStack, tmp_path: Path) -> None:
    own, lent = listener(stack), listener(stack)
    path = tmp_path / "a.sock"
    at_path = stack.enter_context(socket.socket(socket.AF_UNIX))
    at_path.bind(str(path))
    assert take_over(["127.0.0.1:1"], lent=[lent], own=[own, at_path]) == ([lent], [], ["127.0.0.1:1"])
    assert (own.fileno(), at_path.fileno()) == (-1, -1)
    assert lent.fileno() != -1
    assert not path.exists()


def test_whose_they_are_is_handed_over(stack: ExitStack) -> None:
    own, lent, lock = listener(stack), listener(stack), listener(stack)
    environ: dict[str, str] = {}
    reexec.give(lock.fileno(), own=[own], lent=[lent], environ=environ)
    found = reexec.take(environ)
    assert found is not None
    assert environ == {}
    stack.enter_context(socket.socket(fileno=found.lock))
    for sock in (*found.own, *found.lent):
        stack.enter_context(sock)
    assert [address_of(sock) for sock in found.own] == [address_of(own)]
    assert [address_of(sock) for sock in found.lent] == [address_of(lent)]
    older = {reexec.VARIABLE: f"{lock.fileno()}:{own.dup().detach()}"}  # closes nothing: it did not say whose
    again = reexec.take(older)
    assert again is not None
    stack.enter_context(again.lent[0])
    assert (again.own, len(again.lent)) == ((), 1)
