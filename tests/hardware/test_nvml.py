"""NVML through its helper process: a real process, a stand-in for the library at the edge."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from l40sd.hardware import nvml
from l40sd.hardware.nvml import GpuMemory, Nvml, NvmlSilentError
from l40sd.hardware.presence import Failing
from l40sd.model import GpuId, Link

FAKE = str(Path(__file__).parents[1] / "kit/fake_nvml.py")
RECORDED = json.loads((Path(__file__).parents[1] / "fixtures/nvml_h200/nvml.json").read_text())
TWO = {
    "gpus": [
        {"uuid": "GPU-a", "busId": "00000000:18:00.0", "total": 48 << 30, "used": 5},
        {"uuid": "GPU-b", "busId": "00000000:9A:00.0", "total": 48 << 30},
    ],
    "levels": {"0-1": 50},
}
Answers = Callable[[dict[str, Any]], None]


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    file = tmp_path / "nvml.json"
    monkeypatch.setenv("FAKE_NVML", str(file))

    def write(facts: dict[str, Any]) -> None:
        other = file.with_suffix(".new")
        other.write_text(json.dumps(facts))
        other.replace(file)

    write(TWO)
    return write


@pytest.fixture
async def library(answers: Answers) -> AsyncIterator[Nvml]:
    helper = Nvml(timeout_s=20.0, library=FAKE)
    yield helper
    await helper.close()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await holds():  # noqa: ASYNC110  # another process: there is no event to wait for
            await asyncio.sleep(0.01)


def pid_of(library: Nvml) -> int:
    assert library._helper is not None
    return library._helper.pid


async def test_gpus_and_links_are_read(library: Nvml) -> None:
    facts = await library.inventory()
    assert [(gpu.id, gpu.index, gpu.pci, gpu.name) for gpu in facts.gpus] == [
        ("GPU-a", 0, "0000:18:00.0", "NVIDIA L40S"),
        ("GPU-b", 1, "0000:9a:00.0", "NVIDIA L40S"),
    ]
    assert facts.links == {("GPU-a", "GPU-b"): Link.SYS}


@pytest.mark.parametrize(
    ("level", "link"), [(0, Link.PIX), (10, Link.PIX), (20, Link.PXB), (30, Link.PHB), (40, Link.NODE), (50, Link.SYS)]
)
async def test_nvmls_levels_are_nvidia_smis_letters(library: Nvml, answers: Answers, level: int, link: Link) -> None:
    answers({**TWO, "levels": {"0-1": level}})
    assert set((await library.inventory()).links.values()) == {link}


@pytest.mark.parametrize(
    ("one", "other"), [(["switch"], ["switch"]), (["00000000:9A:00.0"], []), ([], ["00000000:18:00.0"])]
)
async def test_nvlink_goes_before_the_pcie_path(
    library: Nvml, answers: Answers, one: list[str], other: list[str]
) -> None:
    a, b = TWO["gpus"]
    answers({**TWO, "gpus": [{**a, "nvlinks": one}, {**b, "nvlinks": other}]})  # type: ignore[dict-item]
    assert set((await library.inventory()).links.values()) == {Link.NV}


async def test_what_nvml_does_not_support_is_left_to_the_kernel(library: Nvml, answers: Answers) -> None:
    answers({**TWO, "levels": {}})
    assert (await library.inventory()).links == {}


async def test_memory_names_who_holds_it(library: Nvml, answers: Answers) -> None:
    a, b = TWO["gpus"]
    answers({**TWO, "gpus": [{**a, "processes": [[os.getpid(), 7 << 30], [2**22 + 1, None]]}, b]})  # type: ignore[dict-item]
    memory = await library.memory()
    comm = Path("/proc/self/comm").read_text().strip()
    assert memory["GPU-a"] == GpuMemory(  # type: ignore[index]
        used_bytes=5, total_bytes=48 << 30, holders=((os.getpid(), comm, 7 << 30), (2**22 + 1, "?", 0))
    )


async def test_a_lost_gpu_does_not_hide_the_others(library: Nvml, answers: Answers) -> None:
    await library.memory()
    assert library.heard is not None
    assert library.heard.failing == ()
    a, b = TWO["gpus"]
    answers({**TWO, "gpus": [{**a, "lost": True}, b]})  # type: ignore[dict-item]
    assert list(await library.memory()) == ["GPU-b"]
    assert library.heard.failing == (Failing(number=0, id=GpuId("GPU-a"), reason="GPU is lost"),)
    await library.renew()
    await library.memory()
    assert library.heard.failing == (Failing(number=0, reason="GPU is lost"),), "this helper never knew its UUID"


@pytest.mark.parametrize("call", ["HandleByIndex", "UUID", "PciInfo", "Name", "MemoryInfo", "ComputeRunningProcesses"])
@pytest.mark.parametrize("reason", ["GPU is lost", "Insufficient Permissions", "Not Supported", "Unknown Error"])
async def test_one_gpus_failing_call_hides_that_gpu_only(
    library: Nvml, answers: Answers, call: str, reason: str
) -> None:
    """Seen: the memory of one partitioned GPU may not be read, and the host had no GPU at all."""
    a, b = TWO["gpus"]
    answers({**TWO, "gpus": [a, {**b, "errors": {f"nvmlDeviceGet{call}": reason}}]})  # type: ignore[dict-item]
    is_known = (call == "MemoryInfo" and reason == "Not Supported") or (
        call == "ComputeRunningProcesses" and reason in ("Not Supported", "Insufficient Permissions")
    )
    await library.memory()
    assert library.heard is not None
    there = [gpu.id for gpu in library.heard.answering]
    assert there == (["GPU-a", "GPU-b"] if is_known else ["GPU-a"])
    assert [each.reason for each in library.heard.failing] == ([] if is_known else [reason])
    is_listed = is_known or call == "ComputeRunningProcesses"
    assert [gpu.id for gpu in (await library.inventory()).gpus] == (["GPU-a", "GPU-b"] if is_listed else ["GPU-a"])


async def test_a_gpu_without_a_place_hides_itself_only(library: Nvml, answers: Answers) -> None:
    a, b = TWO["gpus"]
    answers({**TWO, "gpus": [a, {**b, "busId": "N/A"}]})  # type: ignore[dict-item]
    facts = await library.inventory()
    assert ([gpu.id for gpu in facts.gpus], facts.links) == (["GPU-a"], {})
    await library.memory()
    assert library.heard is not None
    assert [(each.id, each.reason) for each in library.heard.failing] == [("GPU-b", "'N/A' is not a PCI address")]


async def test_a_gpu_whose_memory_cannot_be_told_is_not_lost(library: Nvml, answers: Answers) -> None:
    """Seen: "Not Supported" for a GPU that shares the host's memory, and the GPU was called lost."""
    a, b = TWO["gpus"]
    answers({**TWO, "gpus": [{**a, "errors": {"nvmlDeviceGetMemoryInfo": "Not Supported"}}, b]})  # type: ignore[dict-item]
    assert list(await library.memory()) == ["GPU-b"]
    assert [(gpu.id, gpu.memory_bytes) for gpu in (await library.inventory()).gpus] == [
        ("GPU-a", 0),
        ("GPU-b", 48 << 30),
    ]


async def test_what_the_driver_prints_is_not_taken_for_an_answer(library: Nvml, answers: Answers) -> None:
    answers({**TWO, "noise": '{"id": 1, "answer": {"gpus": [], "links": [], "lost": []}}'})
    assert len((await library.inventory()).gpus) == 2


async def test_a_missing_library_is_an_error_for_the_operator_and_not_asked_again_at_once() -> None:
    helper = Nvml(timeout_s=20.0, library="no_such_library_of_nvidia")
    with pytest.raises(NvmlSilentError, match="No module named"):
        await helper.inventory()
    with pytest.raises(NvmlSilentError, match="No module named"):
        await helper.inventory()
    assert helper._number == 1, "the second question was answered without a helper"
    await helper.close()


async def test_a_hang_is_given_up_and_tried_again(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "RETRY_FIRST_S", 0.05)
    helper = Nvml(timeout_s=20.0, library=FAKE)
    await helper.memory()
    first = pid_of(helper)
    answers({**TWO, "hang": True})
    helper._timeout_s = 0.2
    with pytest.raises(NvmlSilentError, match=r"no answer within 0\.2 s"):
        await helper.memory()
    assert not Path(f"/proc/{first}").exists(), "the hung helper is gone"
    answers(TWO)
    helper._timeout_s = 20.0

    async def answered() -> bool:
        try:
            return bool(await helper.memory())
        except NvmlSilentError:
            return False

    await until(answered)
    assert pid_of(helper) != first
    await helper.close()


async def test_the_wait_between_tries_doubles_up_to_its_limit(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RETRY_FIRST_S", 1.0)
    monkeypatch.setattr(nvml, "RETRY_LIMIT_S", 8.0)
    answers({**TWO, "fail": "Driver Not Loaded"})
    helper = Nvml(timeout_s=20.0, library=FAKE)
    waits = []
    for _ in range(6):
        helper._retry_at_s = 0.0
        with pytest.raises(NvmlSilentError, match="Driver Not Loaded"):
            await helper.memory()
        waits.append(round(helper._retry_at_s - asyncio.get_running_loop().time()))
    assert waits == [1, 2, 4, 8, 8, 8]
    await helper.close()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_helper_that_dies_is_replaced(
    library: Nvml, monkeypatch: pytest.MonkeyPatch, blow: signal.Signals
) -> None:
    monkeypatch.setattr(nvml, "RETRY_FIRST_S", 0.0)
    await library.memory()
    os.kill(pid_of(library), blow)
    with pytest.raises(NvmlSilentError, match="its helper process failed"):
        await library.memory()
    assert await library.memory()


async def test_a_crash_in_the_middle_of_an_answer_is_an_error(library: Nvml, answers: Answers) -> None:
    answers({**TWO, "crash": True})
    with pytest.raises(NvmlSilentError, match="its helper process failed: it ended"):
        await library.inventory()


async def test_a_question_whose_asker_has_gone_does_not_spoil_the_next_one(library: Nvml) -> None:
    await library.memory()
    pid = pid_of(library)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await library.memory()
    os.kill(pid, signal.SIGCONT)
    assert len((await library.inventory()).gpus) == 2
    assert pid_of(library) == pid


async def test_closing_does_not_wait_for_a_hung_helper(answers: Answers) -> None:
    helper = Nvml(timeout_s=20.0, library=FAKE)
    await helper.memory()
    pid = pid_of(helper)
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(5):
        await helper.close()
    assert not Path(f"/proc/{pid}").exists()


async def test_the_helper_goes_when_nobody_listens_any_more(answers: Answers) -> None:
    helper = Nvml(timeout_s=20.0, library=FAKE)
    await helper.memory()
    assert helper._helper is not None
    assert helper._helper.stdin is not None
    helper._helper.stdin.close()
    async with asyncio.timeout(20):
        assert await helper._helper.wait() == 0


async def test_the_gpu_that_was_recorded_reads_as_recorded(library: Nvml, answers: Answers) -> None:
    calls = {name: call.get("value") for name, call in RECORDED["calls"].items()}
    total = int(calls["mem1"].split("total: ")[1].split(" B")[0])
    answers({"gpus": [{"uuid": calls["uuid"], "busId": calls["pci"], "name": calls["name"], "total": total}]})
    (gpu,) = (await library.inventory()).gpus
    assert (gpu.id, gpu.pci, gpu.name, gpu.memory_bytes >> 20) == (calls["uuid"], "0000:00:06.0", "NVIDIA H200", 143771)
