"""However an instance ends, nobody is left of it and the record says why."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
from processkit import PATIENCE_S, Site, end, is_alive, until

from l40sd.errors import L40sError
from l40sd.shim import proc
from l40sd.shim.cgroup import was_oom_killed
from l40sd.workers.process import ExitRecord, Instance
from l40sd.workers.process.leftovers import Remains

FOREVER = "exec sleep 1000"
HIDDEN = "(env -i /bin/sh -c 'setsid sh -c \"echo \\$\\$ > hidden; exec sleep 1000\" &') & "
"""Double-forked, in a session of its own, its environment scrubbed."""


async def ended(instance: Instance) -> ExitRecord:
    async with asyncio.timeout(PATIENCE_S):
        return await instance.exited()


def identity(pid: int) -> proc.Process:
    process = proc.read_process(pid)
    assert process is not None
    return process


async def test_an_engine_that_exits_is_on_record_with_its_code(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec("echo hello; exit 3", meta={"port": 1}), 10)
    record = await ended(instance)
    assert (record.cause, record.code, record.signal, record.oom) == ("exited", 3, None, False)
    assert "hello" in await processes.tail("w", 10)
    processes.forget(instance.spec.instance)
    assert not list((site.runtime_dir / "instances").iterdir())


async def test_fault_1_and_3_a_killed_leader_takes_all_others_along(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec(f"{HIDDEN} sh -c 'echo $$ > core; {FOREVER}' & wait"), 10)
    members = [await site.pid_in("core"), await site.pid_in("hidden")]
    proc.send_signal(identity(instance.engine_pid), signal.SIGKILL)
    record = await ended(instance)
    assert (record.cause, record.signal) == ("exited", signal.SIGKILL)
    assert not any(map(is_alive, members))
    assert not (instance.group and Path(instance.group).exists()), "gone with the last process"
    processes.forget(instance.spec.instance)


async def test_fault_4_a_hidden_daemon_in_the_tree_does_not_survive_a_stop(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec(f"{HIDDEN} {FOREVER}"), 10)
    hidden = await site.pid_in("hidden")
    assert hidden.session != instance.engine_pid
    instance.terminate()
    record = await ended(instance)
    assert (record.cause, record.signal) == ("stopped", signal.SIGTERM)
    assert not is_alive(hidden)
    processes.forget(instance.spec.instance)


async def test_fault_5_a_fork_bomb_is_emptied(site: Site) -> None:
    """Bounded: 100 that fork a successor again and again, and end themselves after some seconds if we fail."""
    bomb = "i=0; while [ $i -lt 40 ]; do (sleep 0.05; exec sleep 0.05) & wait $!; i=$((i+1)); done"
    script = f"n=0; while [ $n -lt 100 ]; do ({bomb}) & n=$((n+1)); done; echo $$ > lit; wait"
    processes = await site.open()
    instance = await processes.spawn(site.spec(script), 10)
    await site.pid_in("lit")
    assert await instance.kill(PATIENCE_S)
    assert (await ended(instance)).cause == "killed"
    assert not site.marked()
    processes.forget(instance.spec.instance)


async def test_fault_6_a_stopped_engine_still_obeys_sigterm(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec("trap 'exit 5' TERM; echo $$ > up; while :; do sleep 0.05; done"), 10)
    await site.pid_in("up")
    engine = identity(instance.engine_pid)
    proc.send_signal(engine, signal.SIGSTOP)
    await until(lambda: identity(engine.pid).state == "T", "the engine is stopped")
    instance.terminate()
    record = await ended(instance)
    assert (record.cause, record.code) == ("stopped", 5)
    processes.forget(instance.spec.instance)


async def test_fault_6_a_stopped_shim_is_killed_with_its_engine(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec(FOREVER), 10)
    os.kill(instance.shim_pid, signal.SIGSTOP)
    await end(processes, instance)


async def test_fault_7_an_engine_that_ignores_sigterm_is_killed(site: Site) -> None:
    processes = await site.open()
    script = "trap '' TERM; echo $$ > up; while :; do sleep 0.05; done"
    instance = await processes.spawn(site.spec(script, term_timeout_s=0.2), 10)
    await site.pid_in("up")
    instance.terminate()
    record = await ended(instance)
    assert (record.cause, record.signal) == ("stopped", signal.SIGKILL)
    assert "0.2 s" in record.detail
    processes.forget(instance.spec.instance)


async def test_fault_8_what_cannot_be_killed_is_told_in_time(tmp_path: Path) -> None:
    """A cgroup that stays populated, as with a process in state D."""
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    (tmp_path / "cgroup.kill").touch()
    assert not await Remains(instance="w-1", group=str(tmp_path)).kill(0.1)
    assert (tmp_path / "cgroup.kill").read_text() == "1"


async def test_fault_14_a_killed_shim_takes_its_engine_along(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec(f"sh -c 'echo $$ > core; {FOREVER}' & wait"), 10)
    members = [await site.pid_in("core"), identity(instance.engine_pid)]
    os.kill(instance.shim_pid, signal.SIGKILL)
    record = await ended(instance)
    assert (record.cause, record.code) == ("shim-lost", None)
    await until(lambda: not any(map(is_alive, members)), "all are gone")
    assert await instance.kill(PATIENCE_S)
    processes.forget(instance.spec.instance)


async def test_fault_14_in_a_cgroup_even_the_hidden_ones_go_with_the_shim(site: Site) -> None:
    if site.provider != "cgroup":
        pytest.skip("the one thing that only a cgroup can do; Processes.note says so")
    processes = await site.open()
    instance = await processes.spawn(site.spec(f"{HIDDEN} {FOREVER}"), 10)
    hidden = await site.pid_in("hidden")
    os.kill(instance.shim_pid, signal.SIGKILL)
    assert (await ended(instance)).cause == "shim-lost"
    assert not is_alive(hidden)
    processes.forget(instance.spec.instance)


async def test_fault_15_without_a_daemon_the_lease_runs_out(site: Site) -> None:
    processes = await site.open()  # nobody holds the lock
    instance = await processes.spawn(site.spec(f"{HIDDEN} {FOREVER}", orphan_grace_s=0.2), 10)
    hidden = await site.pid_in("hidden")
    record = await ended(instance)
    assert record.cause == "orphaned"
    assert not is_alive(hidden)
    processes.forget(instance.spec.instance)


async def test_many_may_wait_and_one_may_give_up(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec(FOREVER), 10)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await instance.exited()
    async with asyncio.TaskGroup() as group:
        waiters = [group.create_task(ended(instance)) for _ in range(3)]
        instance.terminate()
        instance.terminate()
    assert len({waiter.result() for waiter in waiters}) == 1
    instance.terminate()
    processes.forget(instance.spec.instance)


SLOW_ENGINE = """\
trap 'echo told >> told; sleep 0.5; echo clean > clean; exit 0' TERM
echo $$ > up
while :; do sleep 0.05; done
"""
"""Puts things in order for half a second after SIGTERM."""
WRAPPERS = {
    "a shell that waits": "sh engine.sh; exit $?",
    "two of them": "sh -c 'sh engine.sh; exit $?'; exit $?",
    "a pipe": "sh engine.sh | cat",
    "a shell that ends at once": "trap 'exit 0' TERM; sh engine.sh & wait",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
async def test_an_engine_behind_a_wrapper_that_does_not_exec_has_the_whole_grace(site: Site, wrapper: str) -> None:
    """SIGTERM went to the process group: the wrapper died of it, and with the leader gone the engine was killed."""
    processes = await site.open()
    (site.root / "engine.sh").write_text(SLOW_ENGINE)
    instance = await processes.spawn(site.spec(WRAPPERS[wrapper]), 10)
    await site.pid_in("up")
    instance.terminate()
    record = await ended(instance)
    assert (record.cause, record.code, record.detail) == ("stopped", 0, "exit code 0")
    assert (site.root / "clean").exists(), "it was killed before it was done"
    assert (site.root / "told").read_text().split() == ["told"], "once is enough: a second SIGTERM means at once"
    processes.forget(instance.spec.instance)


async def test_sigterm_goes_to_the_leader_who_then_ends_its_ranks(site: Site) -> None:
    """vLLM's tensor-parallel ranks ended at once when SIGTERM reached them too: every open stream was cut."""
    processes = await site.open()
    (site.root / "rank.sh").write_text("trap 'echo told > rank_told; exit' TERM; echo $$ > up; sleep 1000 & wait")
    script = "trap 'sleep 0.3; echo drained > drained; kill -9 $rank; exit 0' TERM; sh rank.sh & rank=$!; wait"
    instance = await processes.spawn(site.spec(script), 10)
    await site.pid_in("up")
    instance.terminate()
    record = await ended(instance)
    assert (record.cause, record.code) == ("stopped", 0)
    assert (site.root / "drained").exists()
    assert not (site.root / "rank_told").exists()
    processes.forget(instance.spec.instance)


async def test_who_is_left_by_the_leader_is_told_and_has_the_rest_of_the_time(site: Site) -> None:
    """What a leader left behind at a stop was killed in the same moment, in the middle of its own cleaning up."""
    processes = await site.open()
    (site.root / "core.sh").write_text(SLOW_ENGINE)
    script = "trap 'exit 0' TERM; setsid sh core.sh & while :; do sleep 0.05; done"
    instance = await processes.spawn(site.spec(script), 10)
    await site.pid_in("up")
    instance.terminate()
    assert (await ended(instance)).cause == "stopped"
    assert (site.root / "clean").exists()
    processes.forget(instance.spec.instance)


async def test_who_is_left_by_the_leader_and_ignores_sigterm_is_killed_at_the_end_of_the_time(site: Site) -> None:
    processes = await site.open()
    (site.root / "core.sh").write_text("trap '' TERM; echo $$ > up; while :; do sleep 0.05; done")
    script = "trap 'exit 0' TERM; sh core.sh & while :; do sleep 0.05; done"
    instance = await processes.spawn(site.spec(script, term_timeout_s=0.5), 10)
    core = await site.pid_in("up")
    instance.terminate()
    record = await ended(instance)
    assert (record.cause, record.code) == ("stopped", 0)
    assert "0.5 s" in record.detail
    assert not is_alive(core)
    processes.forget(instance.spec.instance)


async def test_an_engine_whose_table_says_so_is_told_as_a_whole_group(site: Site) -> None:
    processes = await site.open()
    (site.root / "child.sh").write_text(
        "trap 'echo $$ > child_saw_term; exit' TERM; echo $$ > up; while :; do sleep 0.05; done"
    )
    script = "trap 'wait $child; exit 0' TERM; sh child.sh & child=$!; wait $child"
    instance = await processes.spawn(site.spec(script, term_to="group"), 10)
    await site.pid_in("up")
    instance.terminate()
    assert (await ended(instance)).cause == "stopped"
    assert (site.root / "child_saw_term").exists()
    processes.forget(instance.spec.instance)


async def test_an_engine_that_serves_nobody_yet_is_told_with_all_its_processes(site: Site) -> None:
    """A vLLM that was still loading took all of its time to stop: the front waited for a core that did not listen."""
    processes = await site.open()
    (site.root / "core.sh").write_text("trap 'echo told > core_told; exit' TERM; echo $$ > up; sleep 1000 & wait")
    script = "trap 'wait $core; exit 0' TERM; sh core.sh & core=$!; wait $core"
    instance = await processes.spawn(site.spec(script), 10)
    await site.pid_in("up")
    instance.terminate(everybody=True)
    record = await ended(instance)
    assert (record.cause, record.code, record.detail) == ("stopped", 0, "exit code 0")
    assert (site.root / "core_told").exists()
    processes.forget(instance.spec.instance)


@pytest.mark.parametrize(
    "fault", ["missing", "not executable", "a directory", "no interpreter", "bad cwd", "not in PATH"]
)
async def test_fault_29_a_program_that_cannot_run_is_one_clear_error(site: Site, fault: str) -> None:
    program = site.root / "engine"
    spec = site.spec("", argv=(str(program),))
    expected = ["cannot run", str(program)]
    match fault:
        case "missing":
            expected.append("No such file")
        case "not executable":
            program.write_text("#!/bin/sh\n")
            program.chmod(0o600)
            expected.append("Permission denied")
        case "a directory":
            program.mkdir()
            expected.append("Permission denied")
        case "no interpreter":
            program.write_text("#!/no/such/shell\n")
            program.chmod(0o700)
            expected.append("interpreter is missing")
        case "bad cwd":
            spec = site.spec("", cwd="/no/such/place")
            expected = ["cannot enter", "/no/such/place", "No such file"]
        case _:
            spec = site.spec("", argv=("no-such-engine",), env={"PATH": "/usr/bin:/bin"})
            expected = ["cannot run no-such-engine", "No such file"]
    processes = await site.open()
    with pytest.raises(L40sError) as caught:
        await processes.spawn(spec, 10)
    assert caught.value.code == "exec_failed"
    assert all(part in caught.value.what for part in expected), caught.value.what
    assert not list((site.runtime_dir / "instances").iterdir())


async def test_a_spawn_that_takes_too_long_leaves_nothing(site: Site) -> None:
    processes = await site.open()
    with pytest.raises(L40sError) as caught:
        await processes.spawn(site.spec(FOREVER), 0.001)
    assert caught.value.code == "spawn_failed"
    assert not list((site.runtime_dir / "instances").iterdir())


async def test_a_spawn_that_is_cancelled_leaves_nothing(site: Site) -> None:
    processes = await site.open()
    for delay_s in (0.0, 0.01, 0.03, 0.05):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await processes.spawn(site.spec(FOREVER), 10)
        for instance in list(processes._instances.values()):  # it was faster than we
            await end(processes, instance)
        assert not list((site.runtime_dir / "instances").iterdir())
        assert not site.marked()


async def test_the_engine_gets_only_what_the_spec_says(site: Site) -> None:
    processes = await site.open()
    script = "env > env; ls -l /proc/self/fd > fds; cat /proc/self/stat > stat; cat > stdin; exit 0"
    instance = await processes.spawn(site.spec(script, env={"PATH": os.environ["PATH"], "A": "1"}), 10)
    assert (await ended(instance)).code == 0
    names = {line.partition("=")[0] for line in (site.root / "env").read_text().splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {"PATH", "A", "L40SD_INSTANCE", "L40SD_RUNTIME_DIR"}
    assert len((site.root / "fds").read_text().splitlines()) <= 5  # total, 0, 1, 2, and the listing's own
    assert (site.root / "stat").read_text().split()[5] == str(instance.engine_pid), "a session of its own"
    assert (site.root / "stdin").read_bytes() == b""
    processes.forget(instance.spec.instance)


async def test_the_engine_has_default_signals(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec("exec grep ^Sig /proc/self/status"), 10)
    await ended(instance)
    masks = dict(line.split(":\t") for line in await processes.tail("w", 20) if line.startswith("Sig"))
    assert int(masks["SigIgn"], 16) & 0x7FFFFFFF == 0  # 32 and 33 are the C library's own
    assert int(masks["SigBlk"], 16) == 0
    processes.forget(instance.spec.instance)


async def test_the_shim_is_not_impressed_by_a_terminal(site: Site) -> None:
    processes = await site.open()
    instance = await processes.spawn(site.spec(FOREVER), 10)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        os.kill(instance.shim_pid, number)
    instance.terminate()
    assert (await ended(instance)).cause == "stopped"
    processes.forget(instance.spec.instance)


def test_fault_51_an_oom_kill_is_read_from_the_cgroup(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    events = tmp_path / "engine" / "memory.events"
    assert not was_oom_killed(str(tmp_path))
    events.write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 0\noom_group_kill 0\n")
    assert not was_oom_killed(str(tmp_path))
    events.write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 2\noom_group_kill 1\n")
    assert was_oom_killed(str(tmp_path))
    assert not was_oom_killed("")
