"""The suite's own account: a fault that is not survived shows, and one that was not run counts as neither."""

import socket
from pathlib import Path

import pytest

from faults import machine, suite
from faults.rig import Broken, Rig
from faults.suite import Fault, NotHereError, Outcome, Result, recall, remember, run_one, summary, table


def fault_of(run: object, *, within_s: float | None = None) -> Fault:
    return Fault(number=99, title="t", how="h", expected="e", promise="p", within_s=within_s, run=run)  # type: ignore[arg-type]


async def result_of(run: object, *, within_s: float | None = None, slack: float = 1.0) -> Result:
    return await run_one(fault_of(run, within_s=within_s), is_quick=True, slack=slack)


async def test_a_fault_that_ends_well_is_one_line() -> None:
    async def run(_: Rig) -> Outcome:
        return Outcome(took_s=0.84, lost=1, note="n")

    assert (await result_of(run)).line() == "fault 99 survived in 0.8 s, 1 request lost: t (n)"


@pytest.mark.parametrize("error", [Broken("seen otherwise"), ValueError("a mistake"), TimeoutError()])
async def test_a_fault_that_raises_is_not_survived(error: Exception) -> None:
    async def run(_: Rig) -> Outcome:
        raise error

    result = await result_of(run)
    assert result.verdict == "failed"
    assert (str(error) or "TimeoutError") in result.line()


async def test_a_bound_holds_with_its_slack() -> None:
    async def run(_: Rig) -> Outcome:
        return Outcome(took_s=2.0)

    assert (await result_of(run, within_s=1.0)).verdict == "failed"
    assert (await result_of(run, within_s=1.0, slack=3.0)).verdict == "survived"


async def test_what_is_left_behind_is_not_survived() -> None:
    async def run(rig: Rig) -> Outcome:
        site = rig.site()
        site.socket.parent.mkdir(parents=True)
        site.socket.touch()
        return Outcome(took_s=0.0)

    assert "socket" in (await result_of(run)).note


async def test_a_failed_faults_folder_is_kept_although_a_socket_is_in_it(tmp_path: Path) -> None:
    async def run(rig: Rig) -> Outcome:
        (rig.folder / "daemon.log").write_text("why\n")
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(str(rig.folder / "control.sock"))
        raise Broken("seen otherwise")

    result = await run_one(fault_of(run), is_quick=True, slack=1.0, keep=tmp_path)
    kept = Path(result.note.partition("[")[2].rstrip("]"))
    assert [path.name for path in kept.iterdir()] == ["daemon.log"]


async def test_a_fault_that_cannot_be_injected_here_is_neither(tmp_path: Path) -> None:
    async def run(_: Rig) -> Outcome:
        raise NotHereError("needs a machine")

    result = await result_of(run)
    assert result.verdict == "not run"
    good = Result(number=1, title="t", verdict="survived")
    assert summary([result, good], 3.0) == "not run here: 99\n1 of 1 survived in 3 s"
    remember(tmp_path / "results.json", [result, good])
    remember(tmp_path / "results.json", [good])
    assert recall(tmp_path / "results.json") == {1: good, 99: result}


async def test_with_quick_the_virtual_machine_is_left_out(tmp_path: Path) -> None:
    async def only_there(rig: Rig) -> Outcome:
        return await machine.inject(rig, 52)

    result = await result_of(only_there)
    assert result.verdict == "not run"
    assert result.note.startswith("needs the virtual machine: ")
    here = Outcome(took_s=1.0, note="n")
    assert await machine.inject_too(Rig(number=5, folder=tmp_path, is_quick=True), 5, here) == here


def test_the_table_has_a_row_for_every_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(_: Rig) -> Outcome:
        return Outcome(took_s=0.0)

    monkeypatch.setattr(suite, "FAULTS", {99: fault_of(run)})
    assert "| 99 | t | e | p | not run: no result yet | - |" in table({})
    assert "| 99 | t | e | p | **not survived** | - |" in table({99: Result(number=99, title="t", verdict="failed")})
