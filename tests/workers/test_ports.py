"""Worker ports: nobody else gets them, every engine we know can bind them."""

import contextlib
import errno
import http.server
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from l40sd.errors import L40sError
from l40sd.workers.ports import PortPool, who_has

IP_LOCAL_PORT_RANGE = 51  # Linux 6.3
ENGINES = {
    "SO_REUSEADDR (asyncio, uvicorn, Go)": [socket.SO_REUSEADDR],
    "SO_REUSEPORT (cpp-httplib)": [socket.SO_REUSEPORT],
    "both (vLLM)": [socket.SO_REUSEADDR, socket.SO_REUSEPORT],
}
ADDRESSES = {"127.0.0.1": socket.AF_INET, "0.0.0.0": socket.AF_INET, "::": socket.AF_INET6}


def free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody has at the moment."""
    for first in range(20000, 30000, 7):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


@pytest.fixture
def first() -> int:
    return free_ports(3)


@pytest.fixture
def pool(first: int) -> Iterator[PortPool]:
    pool = PortPool("127.0.0.1", first, first + 2)
    yield pool
    pool.close()


def listening(port: int, options: list[int], address: str = "127.0.0.1") -> socket.socket:
    engine = socket.socket(ADDRESSES[address])
    for option in options:
        engine.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        engine.bind((address, port))
        engine.listen()
    except OSError:
        engine.close()
        raise
    return engine


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_engine_can_bind_a_held_port_and_gets_the_connections(pool: PortPool, engine: str, address: str) -> None:
    held = pool.take()
    try:
        server = listening(held.port, ENGINES[engine], address)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            pytest.skip("no IPv6 here")
        raise
    for _ in range(20):  # none of them may end up at the holder
        with socket.create_connection(("127.0.0.1", held.port), timeout=5):
            server.accept()[0].close()
    server.close()


def test_real_servers_can_bind_a_held_port(pool: PortPool) -> None:
    held = pool.take()
    http.server.HTTPServer(("127.0.0.1", held.port), http.server.SimpleHTTPRequestHandler).server_close()


def test_a_program_that_sets_no_option_needs_the_port_let_go(pool: PortPool) -> None:
    held = pool.take()
    with pytest.raises(OSError, match="in use"):
        listening(held.port, [])
    held.let_go()
    listening(held.port, []).close()
    assert pool.take().port != held.port, "still taken"


def only_from(port: int, options: list[int]) -> socket.socket:
    """A stranger whose kernel-chosen port can only be this one: no waiting for bad luck."""
    stranger = socket.socket()
    try:
        stranger.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
    except OSError:
        stranger.close()
        pytest.skip("IP_LOCAL_PORT_RANGE needs Linux 6.3")
    for option in options:
        stranger.setsockopt(socket.SOL_SOCKET, option, 1)
    return stranger


@pytest.mark.parametrize("options", [[], *ENGINES.values()], ids=str)
def test_the_kernel_gives_a_held_port_to_nobody(options: list[int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # in the kernel's own range, which no stranger can leave
    held = PortPool("127.0.0.1", port, port).take()
    with only_from(port, options) as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", 0))
    with (
        socket.create_server(("127.0.0.1", 0)) as elsewhere,
        only_from(port, []) as stranger,
        pytest.raises(OSError, match="Cannot assign requested address"),
    ):
        stranger.connect(elsewhere.getsockname())
    held.release()
    with only_from(port, options) as stranger:
        stranger.bind(("127.0.0.1", 0))  # the trap does catch
        assert stranger.getsockname()[1] == port


def test_ports_are_taken_in_order_and_given_back(pool: PortPool, first: int) -> None:
    taken = [pool.take().port for _ in range(3)]
    assert taken == [first, first + 1, first + 2]
    with pytest.raises(L40sError) as caught:
        pool.take()
    assert caught.value.code == "no_port"
    pool.adopt(first + 1).release()
    pool.adopt(first + 1).release()
    assert pool.take(avoid=[first]).port == first + 1


@pytest.mark.parametrize("options", [[], *ENGINES.values()], ids=str)
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_fault_22_a_strangers_port_is_skipped_and_the_stranger_named(
    pool: PortPool, first: int, options: list[int], address: str
) -> None:
    with listening(first, options, address):
        assert pool.take().port == first + 1
        (stranger,) = pool.strangers()
        assert (stranger.port, stranger.pid) == (first, os.getpid())
        assert "python" in stranger.command


def test_fault_22_a_full_pool_names_who_has_it(first: int) -> None:
    code = "import socket,sys; s=socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        with pytest.raises(L40sError) as caught:
            PortPool("127.0.0.1", first, first).take()
        assert f"port {first} is in use by pid {stranger.pid} (" in caught.value.what
        stranger.communicate()
    PortPool("127.0.0.1", first, first).take().release()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_running_workers_port_is_adopted(pool: PortPool, first: int, engine: str) -> None:
    with listening(first, ENGINES[engine]):
        adopted = pool.adopt(first)
        assert adopted.is_held is (socket.SO_REUSEPORT in ENGINES[engine])
        assert pool.take().port == first + 1
        assert pool.strangers() == []
        with socket.create_connection(("127.0.0.1", first), timeout=5):
            pass
        adopted.release()


TAKER = """
import sys
from l40sd.workers.ports import PortPool
pool = PortPool("127.0.0.1", int(sys.argv[1]), int(sys.argv[2]))
for line in sys.stdin:
    print(pool.take().port, flush=True)
"""


def taker(first: int, last: int) -> "subprocess.Popen[str]":
    """Another daemon of this user: takes a port for each line."""
    return subprocess.Popen(
        [sys.executable, "-c", TAKER, str(first), str(last)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def asked(process: "subprocess.Popen[str]") -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_two_daemons_of_one_user_never_hold_the_same_port(pool: PortPool, first: int) -> None:
    """Both could bind it, so both started a worker there; the second failed, or shared the first one's connections."""
    with taker(first, first + 2) as other:
        assert pool.take().port == first
        assert asked(other) == first + 1
        assert pool.take().port == first + 2
        with pytest.raises(L40sError, match="2 are workers', 1 are others'"):
            pool.take()
        other.kill()
        other.wait()
        assert pool.take().port == first + 1, "however it dies, its ports are free"


def test_a_claim_ends_with_the_release_and_not_with_the_letting_go(pool: PortPool, first: int) -> None:
    with taker(first, first + 2) as other:
        held = pool.take()
        held.let_go()
        assert asked(other) == first + 1
        held.release()
        assert asked(other) == first
        other.communicate()


def test_a_host_that_is_none_is_told() -> None:
    with pytest.raises(L40sError) as caught:
        PortPool("no such host", 1, 2)
    assert caught.value.code == "bad_host"


def test_who_has_a_port_that_nobody_has(first: int) -> None:
    assert str(who_has(first)) == f"port {first} is in use"


def test_a_released_port_can_be_held_again_while_it_waits_for_old_connections(pool: PortPool, first: int) -> None:
    """TIME_WAIT: the engine closed first."""
    held = pool.take()
    with (
        listening(held.port, [socket.SO_REUSEADDR]) as engine,
        socket.create_connection(("127.0.0.1", held.port)) as client,
    ):
        engine.accept()[0].close()
        assert client.recv(1) == b""
    held.release()
    assert pool.take().port == first
