"""State on disk is the old one or the new one, whatever happens."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from l40sd.errors import L40sError
from l40sd.supervisor.state_file import Store

KILLS = 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.json"


async def test_what_was_saved_is_loaded(path: Path) -> None:
    store = Store(path, version=1)
    assert await store.load() is None
    assert await store.save({"pattern": "A", "workers": [1, None, "ü"]})
    assert await Store(path, version=1).load() == {"pattern": "A", "workers": [1, None, "ü"]}
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


async def test_of_many_saves_the_last_stays(path: Path) -> None:
    store = Store(path, version=1)
    await store.load()
    await asyncio.gather(*(store.save({"number": number}) for number in range(50)))
    assert await store.load() == {"number": 49}


@pytest.mark.parametrize("junk", [b"", b"{", b"\0" * 10, b"[1]", b'{"a": 1}', b'{"version": "x"}', b"\xff\xfe"])
async def test_fault_38_what_cannot_be_read_is_moved_aside(path: Path, junk: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(junk)
    store = Store(path, version=1)
    assert await store.load() is None
    (aside,) = path.parent.glob("state.json.corrupt-*")
    assert aside.read_bytes() == junk
    assert str(aside) in store.notes[0]
    assert await store.save({"pattern": "B"})
    assert await Store(path, version=1).load() == {"pattern": "B"}


async def test_fault_38_a_newer_format_is_refused_and_left_alone(path: Path) -> None:
    await Store(path, version=1).load()
    await Store(path, version=3).save({"pattern": "A"})
    before = path.read_bytes()
    with pytest.raises(L40sError) as caught:
        await Store(path, version=2).load()
    assert caught.value.code == "newer_state"
    assert path.read_bytes() == before
    assert await Store(path, version=3).load() == {"pattern": "A"}


async def test_fault_39_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(L40sError) as caught:
        await Store(tmp_path / "file" / "state.json", version=1).load()
    assert caught.value.code == "not_readable"
    assert str(tmp_path / "file") in caught.value.where


async def test_fault_39_a_directory_that_vanished_degrades(path: Path) -> None:
    store = Store(path, version=1)
    await store.load()
    path.parent.rmdir()
    assert not await store.save({"pattern": "A"})
    assert "in memory only" in store.degraded
    assert "No such file" in store.degraded
    path.parent.mkdir()
    assert await store.retry()
    assert store.degraded == ""
    assert await Store(path, version=1).load() == {"pattern": "A"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:  # noqa: TID251 - nothing else runs yet
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # noqa: TID251


async def test_fault_37_a_full_disk_leaves_the_old_state_and_is_tried_again(small_disk: Path) -> None:
    store = Store(small_disk / "state.json", version=1)
    await store.load()
    assert await store.save({"pattern": "A"})
    (small_disk / "ballast").write_bytes(b"x" * (56 << 10))
    assert not await store.save({"pattern": "B" * 16000})
    assert "No space left" in store.degraded
    assert await Store(small_disk / "state.json", version=1).load() == {"pattern": "A"}
    assert not await store.save({"pattern": "C" * 16000})
    (small_disk / "ballast").unlink()
    assert await store.retry()
    assert store.degraded == ""
    assert await store.load() == {"pattern": "C" * 16000}
    assert sorted(file.name for file in small_disk.iterdir()) == ["state.json"]


WRITER = """
import os, sys
from l40sd.shim.files import write_file
number = 0
while True:
    number += 1
    data = b'{"version":1,"number":%d,"filler":"%s"}' % (number, b"x" * (number * 997 % 20000))
    write_file(sys.argv[1], data)
    os.write(1, b".")
"""


async def test_fault_40_killed_while_writing_a_thousand_times_nothing_is_corrupt(path: Path) -> None:
    """One interpreter forks the writers: a kill costs a fork and not a start."""
    driver = f"""
import os, signal, random, select, sys, json
code = compile({WRITER!r}, "writer", "exec")
import l40sd.shim.files
draw = random.Random(int(sys.argv[2]))
corrupt = 0
for _ in range({KILLS}):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        exec(code)
    os.close(write)
    os.read(read, 1)  # it has written once: from here on it is always in the middle
    select.select([], [], [], draw.uniform(0, 0.002))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    try:
        found = json.load(open(sys.argv[1]))
        corrupt += len(found["filler"]) != found["number"] * 997 % 20000
    except ValueError:
        corrupt += 1
print(corrupt)
"""
    path.parent.mkdir()
    seed = int.from_bytes(os.urandom(4))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", driver, str(path), str(seed), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        async with asyncio.timeout(300):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    assert out.decode().strip() == "0", f"seed {seed}"
    store = Store(path, version=1)
    assert json.loads(path.read_text())["number"] == (await store.load() or {})["number"]
    assert [file.name for file in path.parent.iterdir()] == ["state.json"], "half-written files are cleared away"
