"""What an engine leaves outside its processes goes with it; what others use stays."""

import _multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
from processkit import PATIENCE_S, Site, end, until

from l40sd.shim import leftovers

LEAVES = (
    "mkdir -p $TMPDIR/sub; echo x > $TMPDIR/sub/file; ln -s / $TMPDIR/link; echo $TMPDIR > folder;"
    " echo x > /dev/shm/psm_l40sd_{name}; echo x > /dev/shm/vllm_dist_l40sd_{name}; echo $$ > up;"
)


@pytest.fixture
def segments() -> Iterator[Path]:
    """Where they are; those that a failing test leaves are removed."""
    yield Path(leftovers.SHARED_MEMORY)
    for path in Path(leftovers.SHARED_MEMORY).glob("*l40sd_*"):
        path.unlink()


def left(name: str) -> list[str]:
    return sorted(path.name for path in Path(leftovers.SHARED_MEMORY).glob(f"*l40sd_{name}"))


@pytest.mark.parametrize("how", ["by itself", "stopped", "killed", "its shim killed"])
async def test_what_a_run_leaves_goes_however_it_ends(site: Site, segments: Path, how: str, tmp_path: Path) -> None:
    """vLLM left ten sockets in /tmp at each end, and after a crash its segments of shared memory: memory, for ever."""
    name = f"{os.getpid()}_{how.replace(' ', '_')}"
    folder = tmp_path / "l40sd-run"
    script = LEAVES.format(name=name) + ("exit 1" if how == "by itself" else "exec sleep 1000")
    processes = await site.open()
    instance = await processes.spawn(site.spec(script, tmp=str(folder)), 10)
    await until((site.root / "up").exists, "it has left something")
    match how:
        case "stopped":
            instance.terminate()
        case "killed":
            assert await instance.kill(PATIENCE_S)
        case "its shim killed":
            os.kill(instance.shim_pid, signal.SIGKILL)
        case _:
            pass
    await instance.exited()
    assert (site.root / "folder").read_text().strip() == str(folder), "its temporary folder is its own"
    assert not folder.exists()
    assert left(name) == []
    assert Path("/bin").exists(), "a link is not followed"
    processes.forget(instance.spec.instance)


async def test_a_run_whose_program_cannot_be_run_leaves_no_folder(site: Site, tmp_path: Path) -> None:
    processes = await site.open()
    folder = tmp_path / "l40sd-run"
    with pytest.raises(Exception, match="cannot run"):
        await processes.spawn(site.spec("", argv=("/no/such/engine",), tmp=str(folder)), 10)
    assert not folder.exists()


async def test_a_folder_that_is_there_already_is_somebody_elses(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "l40sd-run"
    folder.mkdir()
    (folder / "theirs").touch()
    processes = await site.open()
    instance = await processes.spawn(site.spec("echo ${TMPDIR-none} > folder", tmp=str(folder)), 10)
    await instance.exited()
    assert (site.root / "folder").read_text().strip() == "none"
    assert (folder / "theirs").exists()
    processes.forget(instance.spec.instance)


def test_a_segment_that_somebody_uses_is_no_leaving(segments: Path) -> None:
    """Another worker's, or a stranger's: mapped, or only open."""
    since_s = (segments / ".").stat().st_ctime - 1
    name = f"psm_l40sd_{os.getpid()}"
    mapped = SharedMemory(f"{name}_mapped", create=True, size=64)
    try:
        with (segments / f"{name}_open").open("w"):
            (segments / f"{name}_left").touch()
            (segments / f"other_l40sd_{os.getpid()}").touch()
            assert f"{name}_mapped" not in leftovers.remove_segments(str(segments), since_s)
            found = {path.name for path in segments.glob(f"*l40sd_{os.getpid()}*")}
            assert found == {f"{name}_mapped", f"{name}_open", f"other_l40sd_{os.getpid()}"}
    finally:
        mapped.close()
        mapped.unlink()


def test_a_semaphore_that_somebody_uses_is_no_leaving(segments: Path) -> None:
    """Who has one has it mapped, and no descriptor of it."""
    since_s = (segments / ".").stat().st_ctime - 1
    name = f"l40sd_{os.getpid()}_semaphore"
    semaphore = _multiprocessing.SemLock(1, 1, 1, f"/{name}", False)
    removed = leftovers.remove_segments(str(segments), since_s)
    assert f"sem.{name}" not in removed
    del semaphore
    assert f"sem.{name}" in leftovers.remove_segments(str(segments), since_s)


def test_a_segment_older_than_the_run_is_not_its_own(tmp_path: Path) -> None:
    old, new = tmp_path / "psm_old", tmp_path / "sem.mp-new"
    old.touch()
    new.touch()
    assert leftovers.remove_segments(str(tmp_path), new.stat().st_ctime + 1) == []
    assert leftovers.remove_segments(str(tmp_path), old.stat().st_ctime - 1) == ["psm_old", "sem.mp-new"]


def test_only_a_folder_of_a_run_is_removed(tmp_path: Path) -> None:
    """A record may be forged: what is not called as such a folder is never removed."""
    for name in ("data", "l40sd-x"):
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / "l40sd-link").symlink_to(tmp_path / "data")
    for name in ("data", "l40sd-x", "l40sd-link", "l40sd-gone"):
        leftovers.remove_folder(str(tmp_path / name))
    leftovers.remove_folder("")
    assert sorted(os.listdir(tmp_path)) == ["data", "l40sd-link"]
    assert (tmp_path / "data" / "sub").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_folder_of_another_user_is_neither_removed_nor_forgotten(tmp_path: Path) -> None:
    """In /tmp everybody may make one that is called so."""
    theirs = tmp_path / "l40sd-00000000aa"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    leftovers.remove_folder(str(theirs))
    assert leftovers.sweep(str(tmp_path), theirs.stat().st_mtime + 1) == []
    assert theirs.exists()


async def test_folders_of_which_nobody_knows_any_more_are_removed_by_the_next_run(site: Site, tmp_path: Path) -> None:
    """Their shim was killed, and under systemd the daemon has another /tmp: nobody would have removed them."""
    place = tmp_path / "tmp"
    place.mkdir()
    for name in ("l40sd-00000000aa", "l40sd-00000000bb", "l40sd-fault79-x", "l40sd-zzzzzzzzzz", "other"):
        (place / name / "sub").mkdir(parents=True)
        os.utime(place / name, (1e9, 1e9))
    os.utime(place / "l40sd-00000000bb")
    processes = await site.open()
    held = place / "l40sd-00000000cc"
    instance = await processes.spawn(site.spec("echo $$ > up; exec sleep 1000", tmp=str(held)), 10)
    await site.pid_in("up")
    os.utime(held, (1e9, 1e9))
    next_one = await processes.spawn(site.spec("exec sleep 1000", tmp=str(place / "l40sd-00000000dd")), 10)
    left = sorted(os.listdir(place))
    ours = ["l40sd-00000000bb", held.name, "l40sd-00000000dd"]
    assert left == [*ours, "l40sd-fault79-x", "l40sd-zzzzzzzzzz", "other"]
    await end(processes, instance, next_one)


def test_this_process_uses_its_own_files() -> None:
    with open(sys.executable, "rb") as file:
        one = os.fstat(file.fileno())
        used = leftovers.in_use()
    assert (one.st_dev, one.st_ino) in used
