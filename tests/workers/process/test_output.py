"""An engine's output: capped, whole, never in the engine's way."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from processkit import PATIENCE_S, Site, end, until

from l40sd.shim.output import RotatingLog
from l40sd.workers.process import Position, logs


def content(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in reversed(logs.generations(path)))


def sizes(path: Path) -> list[int]:
    """By inode, and without the one that is being renamed: the log may be rotated meanwhile."""
    found = {}
    for file in logs.generations(path):
        with contextlib.suppress(FileNotFoundError):
            found[file.stat().st_ino] = file.stat().st_size
    return list(found.values())


@settings(deadline=None, max_examples=examples(50))  # a file system under load is no fault
@given(
    chunks=st.lists(st.binary(max_size=300) | st.just(b"line\n" * 20), max_size=30),
    cap=st.integers(min_value=10, max_value=500),
    files=st.integers(min_value=1, max_value=5),
)
def test_what_is_kept_is_the_end_of_what_was_written(chunks: list[bytes], cap: int, files: int) -> None:
    written = b"".join(chunks)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "w.log"
        log = RotatingLog(str(path), cap, files)
        for chunk in chunks:
            log.write(chunk)
        log.close()
        assert written.endswith(content(path))
        assert len(logs.generations(path)) <= files
        assert all(size <= cap for size in sizes(path))
        if len(written) <= cap:
            assert content(path) == written


def test_lines_stay_whole_over_a_rotation(tmp_path: Path) -> None:
    log = RotatingLog(str(tmp_path / "w.log"), 100, 3)
    for number in range(60):
        log.write(b"line %d\n" % number * 2)
    log.close()
    for file in logs.generations(tmp_path / "w.log"):
        assert file.read_bytes().startswith(b"line")
        assert file.read_bytes().endswith(b"\n")


def test_a_removed_file_is_made_anew(tmp_path: Path) -> None:
    log = RotatingLog(str(tmp_path / "w.log"), 100, 3)
    (tmp_path / "w.log").unlink()
    log.tick()
    log.write(b"here\n")
    log.close()
    assert content(tmp_path / "w.log") == b"here\n"


def test_a_directory_that_comes_later_loses_only_what_came_before(tmp_path: Path) -> None:
    log = RotatingLog(str(tmp_path / "logs" / "w.log"), 1000, 3)
    log.write(b"lost\n")
    (tmp_path / "logs").mkdir()
    log.tick()
    log.write(b"kept\n")
    log.close()
    assert content(tmp_path / "logs" / "w.log") == (
        b"--- l40sd: 5 bytes of output dropped: No such file or directory\nkept\n"
    )


async def test_fault_34_a_flood_stays_within_its_files(site: Site) -> None:
    processes = await site.open()
    spec = site.spec("exec yes 'a flood of output'", log_file_bytes=1 << 20, log_files=3)
    instance = await processes.spawn(spec, 10)
    path = processes.log_path("w")
    files = [0]  # as they were seen one after the other; a file system may give a new one an old one's number

    def rotated() -> bool:
        with contextlib.suppress(FileNotFoundError):
            if (number := path.stat().st_ino) != files[-1]:
                files.append(number)
        assert sum(sizes(path)) <= 3 << 20
        return len(files) > 5

    await until(rotated, "file after file is filled: the engine is not blocked")
    await end(processes, instance)


async def test_fault_35_one_endless_line_of_anything_costs_no_memory(site: Site) -> None:
    """40 MB without a newline: NULs and bytes that are no UTF-8."""
    processes = await site.open()
    script = (
        "head -c 20000000 /dev/zero; head -c 20000000 /dev/zero | tr '\\0' '\\377'; echo;"
        " echo $$ > done; exec sleep 1000"
    )
    instance = await processes.spawn(site.spec(script, log_file_bytes=4 << 20, log_files=2), 10)
    await site.pid_in("done")
    status = Path(f"/proc/{instance.shim_pid}/status").read_text()
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kb < 32_000
    await end(processes, instance)
    lines = await processes.tail("w", 2)
    assert lines[0].startswith("\\xff\\xff")
    assert all(len(line) < 2100 and line.isprintable() for line in lines)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    path = tmp_path / "log"
    path.mkdir()
    mounted = subprocess.run(  # noqa: TID251 - nothing else runs yet
        ["mount", "-t", "tmpfs", "-o", "size=128k,mode=0755", "tmpfs", str(path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # noqa: TID251


async def test_fault_36_a_full_disk_costs_output_and_not_the_worker(small_disk: Path, site: Site) -> None:
    processes = await site.open()
    script = (
        "i=0; while [ $i -lt 3000 ]; do echo a line of output that fills the disk $i; i=$((i+1)); done;"
        " echo $$ > done; while ! [ -e go ]; do sleep 0.05; done; echo last; exec sleep 1000"
    )
    (small_disk / "ballast").write_bytes(b"x" * 60_000)
    instance = await processes.spawn(site.spec(script, log_file_bytes=1 << 20, log_files=2), 10)
    await site.pid_in("done")
    path = processes.log_path("w")
    assert path.stat().st_size < 128 << 10
    (small_disk / "ballast").unlink()
    await until(lambda: b" bytes of output dropped: No space left on device\n" in content(path), "it says so")
    (site.root / "go").touch()
    await until(lambda: content(path).endswith(b"last\n"), "output goes on")
    await end(processes, instance)


async def test_output_up_to_the_last_byte_is_kept(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec("i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done"), 10)
    await instance.exited()
    lines = [line for line in await processes.tail("w", 6000) if line.startswith("line")]
    assert lines == [f"line {number}" for number in range(5000)]
    processes.forget(instance.spec.instance)


async def test_a_writer_that_survives_its_leader_does_not_hold_the_shim(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec("setsid yes & exit 0"), 10)
    async with asyncio.timeout(PATIENCE_S):
        assert (await instance.exited()).code == 0
    processes.forget(instance.spec.instance)


def test_tail_reads_over_rotations_and_makes_lines_harmless(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    (tmp_path / "w.log.1").write_bytes(b"one\ntwo\nthr")
    path.write_bytes(b"ee\n\x1b[31mred\x1b[0m\n\x1b]0;title\x07\nlast without newline")
    assert logs.tail(path, 3) == ["red", "\\x1b]0;title\\x07", "last without newline"]
    assert logs.tail(path, 5)[:2] == ["two", "three"]
    assert len(logs.tail(path, 100)) == 6
    assert logs.tail(path, 0) == []
    assert logs.tail(tmp_path / "none.log", 5) == []


async def collect(stream: AsyncIterator[tuple[bytes, Position]], count: int) -> bytes:
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        async for chunk, _ in stream:
            data += chunk
            if len(data) >= count:
                break
    return data


async def test_follow_sees_everything_across_rotations(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    path.write_bytes(b"before\n")
    log = RotatingLog(str(path), 1000, 50)
    written = b"".join(b"line %d\n" % number for number in range(2000))
    stream = logs.follow(path, poll_s=0.001)

    async def write() -> None:
        for start in range(0, len(written), 700):
            log.write(written[start : start + 700])
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        first = group.create_task(anext(aiter(stream)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        group.create_task(write())
        got, _ = await first
        got += await collect(stream, len(written) - len(got))
    await stream.aclose()  # type: ignore[attr-defined]
    log.close()
    assert got == written


async def test_follow_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    stream = logs.follow(path, poll_s=0.001)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(collect(stream, 5))
        await asyncio.sleep(0)
        path.write_bytes(b"here\n")
    assert waiting.result() == b"here\n"
    await stream.aclose()  # type: ignore[attr-defined]


async def in_parts(*parts: bytes) -> AsyncIterator[tuple[bytes, Position]]:
    offset = 0
    for part in parts:
        offset += len(part)
        yield part, Position(inode=1, offset=offset)


async def shown_of(*parts: bytes) -> str:
    return "".join([text async for text, _ in logs.printable_lines(in_parts(*parts))])


@given(parts=st.lists(st.binary(max_size=12) | st.sampled_from([b"\r", b"\n", b"\x1b[2J", b"x" * 9000]), max_size=12))
async def test_what_is_followed_does_nothing_to_a_terminal(parts: list[bytes]) -> None:
    """Seen: an engine's title, bell and clear-screen sequences reached the operator through `logs -f`."""
    shown = await shown_of(*parts)
    assert all(c.isprintable() or c in "\t\n" for c in shown)
    whole = await shown_of(b"".join(parts))
    assert [line[:100] for line in shown.split("\n")] == [line[:100] for line in whole.split("\n")]


async def test_followed_lines_are_whole_and_long_ones_are_cut() -> None:
    shown = await shown_of(
        b"one\ntw", b"o\r", b"\n10%\r20%\r30%", b"\r\n\x1b]0;title\x07\n", b"y" * 9000, b"y" * 9000, b"\nlast\n"
    )
    lines = ["one", "two", "10%", "20%", "30%", "\\x1b]0;title\\x07", "y" * 2000 + "...", "last"]
    assert shown.splitlines() == lines


@settings(deadline=None, max_examples=examples(50))
@given(
    cuts=st.lists(st.integers(min_value=1, max_value=90), max_size=12),
    cap=st.integers(min_value=30, max_value=300),
    back=st.integers(min_value=0, max_value=5),
)
async def test_whoever_follows_again_from_where_he_was_misses_no_line_and_sees_none_twice(
    cuts: list[int], cap: int, back: int
) -> None:
    """Seen: `logs -f` ended with its daemon, and begun anew it lacked what the worker had written meanwhile."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "w.log"
        log = RotatingLog(str(path), cap, 100)
        rest = written = b"".join(b"line %d\n" % number for number in range(60))
        log.write(rest[:37])
        rest = rest[37:]
        seen, at = logs.tail_to_resume(path, back)
        first = written[:37].count(b"\n")
        for cut in [*cuts, len(rest)]:
            log.write(rest[:cut])
            rest = rest[cut:]
            end = b"".join(file.read_bytes() for file in reversed(logs.generations(path))).count(b"\n")
            stream = logs.printable_lines(logs.follow(path, at, poll_s=0.001))
            while len(seen) - min(first, back) + first < end:
                text, at = await anext(stream)
                seen += text.splitlines()
            await stream.aclose()  # type: ignore[attr-defined]
        log.close()
        assert seen == [f"line {number}" for number in range(max(0, first - back), 60)]


async def test_a_position_whose_file_is_gone_is_the_oldest_that_is_left(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    (tmp_path / "w.log.1").write_bytes(b"older\n")
    path.write_bytes(b"newer\n")
    stream = logs.printable_lines(logs.follow(path, Position(inode=1, offset=5), poll_s=0.001))
    async with asyncio.timeout(PATIENCE_S):
        assert [(await anext(stream))[0], (await anext(stream))[0]] == ["older\n", "newer\n"]
    await stream.aclose()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="is no position"):
        Position.parse("1:²")
    assert str(Position.parse("12:34")) == "12:34"
