"""One daemon a runtime directory; the shims can ask whether it lives."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stranger import BECOME, passable

from l40sd.daemon.lock import DaemonLock
from l40sd.errors import L40sError
from l40sd.shim.watcher import lock_is_free

HOLDER = """
import sys
from pathlib import Path
from l40sd.daemon.lock import DaemonLock
lock = DaemonLock.acquire(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "l40sd.lock"


def test_fault_17_a_second_daemon_is_told_who_the_first_is(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        assert not lock_is_free(str(path))
        with pytest.raises(L40sError) as caught:
            DaemonLock.acquire(path)
        assert caught.value.code == "already_running"
        assert f"(pid {first.pid})" in caught.value.what
        assert not lock_is_free(str(path)), "asking did not loosen it"
        first.kill()
        first.wait()
        assert lock_is_free(str(path)), "it goes with its process"
    DaemonLock.acquire(path).release()


def test_fault_17_also_within_one_process(path: Path) -> None:
    first = DaemonLock.acquire(path)
    with pytest.raises(L40sError):
        DaemonLock.acquire(path)
    first.release()
    first.release()
    DaemonLock.acquire(path).release()


def test_fault_18_a_stale_file_is_no_obstacle(path: Path) -> None:
    path.write_text("999999999 and more than fits\n")
    assert lock_is_free(str(path))
    lock = DaemonLock.acquire(path)
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_a_removed_file_is_noticed(path: Path) -> None:
    lock = DaemonLock.acquire(path)
    assert lock.is_intact()
    path.unlink()
    assert not lock.is_intact()
    assert lock_is_free(str(path))
    lock.release()


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_in_its_place_is_refused_and_not_followed(path: Path, link: Callable[[Path, Path], None]) -> None:
    """Seen: the file that it led to was emptied and got a pid."""
    precious = path.with_name("precious")
    precious.write_text("mine")
    link(path, precious)
    with pytest.raises(L40sError) as caught:
        DaemonLock.acquire(path)
    assert caught.value.code == "cannot_lock"
    assert precious.read_text() == "mine"


def test_an_earlier_versions_file_is_closed_to_others(path: Path) -> None:
    path.touch(0o644)
    lock = DaemonLock.acquire(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    resumed = DaemonLock.resume(path, os.dup(lock.keep_over_exec()))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    resumed.release()
    lock.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_cannot_hold_the_lock(path: Path) -> None:
    """Seen: a read lock of any local user kept the daemon from starting, and the shims from seeing that none lives."""
    lock = DaemonLock.acquire(path)
    program = f"import sys; {BECOME}try: os.open(sys.argv[1], os.O_RDONLY)\nexcept PermissionError: print('refused')"
    with passable(path):
        said = subprocess.check_output([sys.executable, "-c", program, str(path)], text=True)
    assert said == "refused\n"
    lock.release()


def test_the_lock_survives_exec_in_place(path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from l40sd.daemon.lock import DaemonLock
path = Path(sys.argv[1])
if len(sys.argv) == 2:
    descriptor = DaemonLock.acquire(path).keep_over_exec()
    os.execv(sys.executable, [sys.executable, "-c", {"os.environ['CODE']"!s}, str(path), str(descriptor)])
lock = DaemonLock.resume(path, int(sys.argv[2]))
print(lock.is_intact(), os.get_inheritable(int(sys.argv[2])), flush=True)
sys.stdin.read()
"""
    env = {**os.environ, "CODE": code}
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True False\n"
        assert not lock_is_free(str(path))
        process.communicate()
    assert lock_is_free(str(path))


def test_a_place_that_cannot_hold_a_lock_is_named(tmp_path: Path) -> None:
    with pytest.raises(L40sError) as caught:
        DaemonLock.acquire(tmp_path / "missing" / "l40sd.lock")
    assert caught.value.code == "cannot_lock"
    assert "missing" in caught.value.where


def test_fault_19_a_lock_whose_file_was_deleted_is_taken_anew(path: Path) -> None:
    lock = DaemonLock.acquire(path)
    assert not lock.restore()
    path.unlink()
    assert lock_is_free(str(path)), "the shims would count the daemon as gone"
    assert lock.restore()
    assert not lock_is_free(str(path))
    assert lock.is_intact()
    lock.release()


def test_fault_19_a_place_that_another_daemon_took_meanwhile_stays_its_own(path: Path) -> None:
    lock = DaemonLock.acquire(path)
    path.unlink()
    other = DaemonLock.acquire(path)
    with pytest.raises(L40sError) as caught:
        lock.restore()
    assert caught.value.code == "already_running"
    assert other.is_intact()
    lock.release()
    other.release()
