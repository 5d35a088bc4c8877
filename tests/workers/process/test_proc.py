"""Processes by identity: exactly the one meant, or nobody."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from l40sd.shim import cgroup, files, proc


@pytest.fixture
def child() -> Iterator[proc.Process]:
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as running:
        process = proc.read_process(running.pid)
        assert process is not None
        yield process
        running.kill()


def is_running(process: proc.Process) -> bool:
    now = proc.read_process(process.pid)
    return now is not None and now.is_alive


def test_fault_20_a_signal_goes_to_the_one_meant_or_to_nobody(child: proc.Process) -> None:
    assert not proc.send_signal(child._replace(start_ticks=child.start_ticks - 1), signal.SIGKILL)
    assert is_running(child)
    assert proc.send_signal(child, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(child)


def test_nobody_has_a_pid_that_cannot_be(child: proc.Process) -> None:
    assert proc.read_process(1 << 30) is None
    assert not proc.send_signal(child._replace(pid=1 << 30), signal.SIGKILL)


def test_a_name_with_brackets_and_spaces_is_read_right(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "1000"]) as running:
        process = proc.read_process(running.pid)
        assert process is not None
        assert process.parent == os.getpid()
        running.kill()


def test_descendants_are_found_at_any_depth_and_in_any_session(child: proc.Process) -> None:
    script = "setsid sh -c 'setsid sh -c \"echo; exec sleep 1000\" & wait' & wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        found = proc.descendants(running.pid)
        assert len(found) >= 2
        assert child.pid not in {process.pid for process in found}
        with_session = {process.pid for process in proc.descendants(running.pid, session=child.session)}
        assert with_session == {child.pid} | {process.pid for process in found}
        while left := proc.descendants(running.pid):
            proc.kill_all(lambda left=left: left)  # type: ignore[misc]
        running.kill()


def test_an_own_group_is_a_directory_with_its_processes() -> None:
    group = cgroup.own()
    if group is None:
        pytest.skip("no cgroup2 here")
    assert str(os.getpid()) in Path(group, "cgroup.procs").read_text().split()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_file(str(path), b"old", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / f"file.tmp-{os.getpid()}").mkdir()
    with pytest.raises(OSError, match="directory"):
        files.write_file(str(path), b"new")
    assert path.read_bytes() == b"old"


def test_a_shim_whose_spec_was_withdrawn_ends_quietly(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: TID251 - a test may block
        [sys.executable, "-m", "l40sd.shim", str(tmp_path)], check=False, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


def test_the_shim_loads_little() -> None:
    """Twelve start at once, and stay: what it imports is paid twelve times."""
    code = "import sys; import l40sd.shim.watcher; print(*sys.modules)"
    done = subprocess.run(  # noqa: TID251
        [sys.executable, "-S", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(proc.__file__).parents[2])},
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"asyncio", "subprocess", "pathlib", "logging", "threading", "socket", "typing_extensions"}


def at(pid: int) -> proc.Process:
    return proc.Process(pid, "S", 0, 0, 0)


def who_obeys(children: dict[int, list[int]], handlers: set[int]) -> list[int]:
    below = {parent: [at(pid) for pid in pids] for parent, pids in children.items()}
    return [one.pid for one in proc.who_obeys(at(1), below, lambda one: one.pid in handlers)]


def test_sigterm_is_for_the_first_process_that_has_a_handler() -> None:
    """As seen: vLLM with its ranks; the same behind bash; behind `numactl`-like exec chains; with a `tee` beside it."""
    assert who_obeys({1: [2, 3], 3: [4, 5]}, {1, 3, 4, 5}) == [1]
    assert who_obeys({1: [2], 2: [3, 4], 4: [5]}, {2, 4, 5}) == [2]
    assert who_obeys({1: [2], 2: [3], 3: [4]}, {3}) == [3]
    assert who_obeys({1: [2, 3]}, {2}) == [2]
    assert who_obeys({1: [2, 3]}, {2, 3}) == [2, 3], "a wrapper of two engines"
    assert who_obeys({1: [2, 3]}, set()) == [], "nobody has anything to put in order"


def test_who_has_a_handler_is_the_kernels_word(child: proc.Process) -> None:
    assert not proc.catches(child, signal.SIGTERM)
    assert not proc.catches(child._replace(pid=1 << 30), signal.SIGTERM)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        own = proc.read_process(os.getpid())
        assert own is not None
        assert proc.catches(own, signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert not proc.catches(own, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
