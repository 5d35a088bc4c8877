"""How the daemon asks for a worker's unit; tests/systemd has the other side of the socket."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from l40sd.adapters.process import providers
from l40sd.adapters.process.providers import Late, Unavailable, start_unit
from l40sd.core.errors import L40sError


@contextlib.asynccontextmanager
async def starter(path: Path, answer: bytes | None) -> AsyncIterator[list[bytes]]:
    """Listen as the starter does, note what is asked and answer this; None: say nothing until the asker has gone."""
    asked: list[bytes] = []
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read())
        if answer is None:
            await is_over.wait()
        with contextlib.suppress(OSError):
            writer.write(answer or b"")
            writer.close()
            await writer.wait_closed()

    async with asyncio.TaskGroup() as served:
        async with await asyncio.start_unix_server(lambda *ends: served.create_task(serve(*ends)), path):
            yield asked
        is_over.set()


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a systemctl before the host's own, and return where it notes how it was called."""
    noted = tmp_path / "called"
    program = tmp_path / "bin/systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{noted}\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return noted


async def test_the_starter_is_told_one_instance_and_systemctl_is_left_alone(tmp_path: Path, systemctl: Path) -> None:
    async with starter(tmp_path / "sock", b"0 \n") as asked:
        await start_unit("m-gpu0-1a", starter=tmp_path / "sock")
    assert asked == [b"m-gpu0-1a\n"]
    assert not systemctl.exists()


@pytest.mark.parametrize("is_left", [False, True])
async def test_without_a_starter_systemctl_is_asked_as_under_the_units_of_an_older_release(
    tmp_path: Path, systemctl: Path, *, is_left: bool
) -> None:
    """Seen: an older release installed over this one left the socket's file behind, and no worker started."""
    if is_left:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "sock"))
    await start_unit("m-gpu0-1a", starter=tmp_path / "sock")
    called = systemctl.read_text(encoding="utf-8").split()
    assert called == ["--no-block", "--no-ask-password", "start", "l40s-worker@m-gpu0-1a.service"]


async def test_without_a_starter_and_refused_by_polkit_it_is_the_starter_that_is_named(
    tmp_path: Path, systemctl: Path
) -> None:
    (systemctl.parent / "bin/systemctl").write_text("#!/bin/sh\necho Access denied >&2; exit 4\n", encoding="utf-8")
    with pytest.raises(Unavailable, match=r"nobody listens at .*sock \(systemctl start .*\); Access denied$"):
        await start_unit("a", starter=tmp_path / "sock")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"1 Failed to start: Unit is masked.\n", "^Failed to start: Unit is masked.$"),
        (b"1 \n", "gave no answer"),
        (b"", "gave no answer"),
        (b"1 " + b"x" * 100_000, "^x{4094}$"),
        (b"\xff\n", "gave no answer"),
    ],
)
async def test_what_systemd_says_is_passed_on_and_bounded(
    tmp_path: Path, systemctl: Path, answer: bytes, said: str
) -> None:
    async with starter(tmp_path / "sock", answer):
        with pytest.raises(Unavailable, match=said):
            await start_unit("a", starter=tmp_path / "sock")
    assert not systemctl.exists(), "who was refused does not try another way"


async def test_a_starter_that_says_nothing_is_waited_for_no_longer_than_the_limit(tmp_path: Path) -> None:
    async with starter(tmp_path / "sock", None):
        with pytest.raises(Late, match=r"took longer than 0\.1 s"):
            await start_unit("a", timeout_s=0.1, starter=tmp_path / "sock")


@pytest.mark.parametrize("answer", [b"0 \n", None, b"1 Failed to start: Unit is masked.\n"])
async def test_a_starter_that_is_late_is_one_all_the_same(
    tmp_path: Path, systemctl: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    """Seen on a host that was slow at its start: workers without units for good, and none of them could be pinned."""
    monkeypatch.setattr(providers, "PROBE_TIMEOUT_S", 0.1 if answer is None else 20.0)
    monkeypatch.setattr(providers, "STARTER", tmp_path / "sock")
    monkeypatch.setattr(providers, "UNIT_RUNTIME_DIR", tmp_path)
    monkeypatch.setattr(providers, "SYSTEMD_RUNS", tmp_path)
    async with starter(tmp_path / "sock", answer):
        if answer is None:
            provider = await providers.choose("auto", tmp_path)
            assert provider.name == "unit"
            assert provider.note == f"{tmp_path}/sock took longer than 0.1 s at the daemon's start"
        elif answer.startswith(b"0"):
            assert await providers.choose("auto", tmp_path) == providers.Provider(name="unit")
        else:
            with pytest.raises(L40sError, match="Unit is masked"):
                await providers.choose("unit", tmp_path)


async def test_without_a_starter_a_late_systemctl_is_no_unit(tmp_path: Path, systemctl: Path) -> None:
    """Seen on a slow host without polkit's rules: the next daemon took units, and the workers were made anew."""
    (systemctl.parent / "bin/systemctl").write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    with pytest.raises(Unavailable, match=r"nobody listens at .*; systemctl start took longer than 0\.1 s") as raised:
        await start_unit("a", timeout_s=0.1, starter=tmp_path / "sock")
    assert not isinstance(raised.value, Late)
