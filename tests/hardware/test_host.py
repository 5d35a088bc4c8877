"""The machine as the daemon sees it: live through NVML and /sys, or from a file."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from l40sd.config.options import Config, HostConfig, ModelConfig
from l40sd.errors import L40sError
from l40sd.hardware import host as host_module
from l40sd.hardware import nvml
from l40sd.hardware.host import GpuMemory, Host
from l40sd.hardware.host_files import bundled_hosts
from l40sd.model import GpuId, ModelFacts, ModelName

FAKE = str(Path(__file__).parents[1] / "kit/fake_nvml.py")
ONE: dict[str, Any] = {"gpus": [{"uuid": "GPU-a", "busId": "00000000:18:00.0", "total": 48 << 30, "used": 3}]}


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "nvml.json"
    file.write_text(json.dumps(ONE))
    monkeypatch.setenv("FAKE_NVML", str(file))
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, FAKE)
    return file


async def test_a_bundled_host_is_opened_by_name_and_is_all_free() -> None:
    host = await Host.open(HostConfig(inventory="l40s-12-4+2"))
    assert host.inventory.source == "l40s-12-4+2 (bundled)"
    assert not host.inventory.is_live
    memory = await host.memory()
    assert memory is not None
    assert set(memory.values()) == {GpuMemory(used_bytes=0, total_bytes=46068 << 20)}
    assert host.degraded == ()
    await host.close()


async def test_every_bundled_host_opens() -> None:
    for name in bundled_hosts():
        assert (await Host.open(HostConfig(inventory=name))).inventory.host == name


async def test_a_host_file_is_opened_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "my host.toml"
    file.write_text("[[gpus]]\n[[gpus]]\n")
    host = await Host.open(HostConfig(inventory=str(file)))
    assert (len(host.inventory.gpus), host.inventory.source) == (2, str(file))


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("l40s-12", "cannot read host file 'l40s-12'", "did you mean l40s-12-"),
        ("/nowhere.toml", "No such file or directory", "bundled hosts: l40s-11-awkward, l40s-12-4+2"),
        (".", "Is a directory", "bundled hosts"),
    ],
)
async def test_a_host_that_is_not_there_is_refused_with_the_ones_that_are(name: str, what: str, hint: str) -> None:
    with pytest.raises(L40sError) as caught:
        await Host.open(HostConfig(inventory=name))
    assert what in caught.value.what
    assert hint in caught.value.hint


async def test_this_machine_is_read_through_nvml_and_its_memory_with_it(answers: Path) -> None:
    host = await Host.open(HostConfig())
    assert [gpu.id for gpu in host.inventory.gpus] == ["GPU-a"]
    assert host.inventory.is_live
    assert await host.memory() == {"GPU-a": GpuMemory(used_bytes=3, total_bytes=48 << 30)}
    await host.close()


async def test_nvml_that_falls_silent_is_degraded_until_it_speaks_again(
    answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "RETRY_FIRST_S", 0.0)
    host = await Host.open(HostConfig())
    answers.write_text(json.dumps({**ONE, "crash": True}))
    assert await host.memory() is None
    assert host.degraded == ("GPU memory is unknown: NVML: its helper process failed: it ended",)
    answers.write_text(json.dumps(ONE))
    assert await host.memory() is not None
    assert host.degraded == ()
    await host.close()


async def test_a_lost_gpu_is_missing_from_the_memory_and_named(answers: Path) -> None:
    host = await Host.open(HostConfig())
    answers.write_text(json.dumps({"gpus": [{**ONE["gpus"][0], "lost": True}]}))
    assert await host.memory() == {}
    assert host.degraded == ("lost: GPU0 (0000:18:00.0): GPU is lost",)
    assert [lost.id for lost in host.lost] == ["GPU-a"]
    await host.close()


async def test_without_a_gpu_the_host_is_empty_and_says_so(answers: Path) -> None:
    """Seen: a driver that loads a moment later than the daemon, which had ended and was not started again."""
    answers.write_text(json.dumps({"gpus": []}))
    host = await Host.open(HostConfig())
    assert host.inventory.gpus == ()
    assert host.inventory.is_live
    assert "no NVIDIA GPU on this machine (NVML finds none)" in host.degraded[0]
    assert bundled_hosts()[0] in host.degraded[0]
    answers.write_text(json.dumps(ONE))
    await host.memory()
    assert host.offered == (), "NVML looks for GPUs when it starts"
    await host.renew()
    await host.memory()
    assert host.offered == ("GPU0 (0000:18:00.0)",)
    host.take(await host.look(held=()))
    assert [gpu.id for gpu in host.inventory.gpus] == ["GPU-a"]
    assert host.degraded == ()
    await host.close()


FOUR: list[dict[str, Any]] = [
    {"uuid": f"GPU-{n}", "busId": f"00000000:1{n}:00.0", "total": 48 << 30, "used": 0} for n in range(4)
]


async def test_a_gpu_missing_at_the_start_is_named_and_the_others_keep_their_numbers(answers: Path) -> None:
    answers.write_text(json.dumps({"gpus": FOUR}))
    before = await Host.open(HostConfig())
    await before.close()
    answers.write_text(json.dumps({"gpus": [FOUR[0], *FOUR[2:]]}))
    host = await Host.open(HostConfig())
    await host.adopt(before.known, held=())
    assert [(gpu.id, gpu.index) for gpu in host.inventory.gpus] == [("GPU-0", 0), ("GPU-2", 2), ("GPU-3", 3)]
    assert host.degraded == ("lost: GPU1 (0000:11:00.0): NVML does not list it",)
    answers.write_text(json.dumps({"gpus": FOUR}))
    await host.renew()
    await host.memory()
    assert host.lost == ()
    assert "GPU1 (0000:11:00.0) answers and is not in use: `l40sctl reload`" in host.degraded[0]
    former = host.take(await host.look(held=()))
    assert [gpu.index for gpu in host.inventory.gpus] == [0, 1, 2, 3]
    assert host.degraded == ()
    host.take(former)
    assert len(host.inventory.gpus) == 3, "a look that is not to be is taken back"
    await host.close()


async def test_a_lost_gpu_that_a_worker_holds_stays_and_one_that_was_removed_can_be_forgotten(answers: Path) -> None:
    answers.write_text(json.dumps({"gpus": FOUR}))
    host = await Host.open(HostConfig())
    answers.write_text(json.dumps({"gpus": FOUR[:2]}))
    found = await host.look(held={GpuId("GPU-2")})
    assert [gpu.index for gpu in found.inventory.gpus] == [0, 1, 2]
    host.take(found)
    assert [lost.name for lost in host.lost] == ["GPU2 (0000:12:00.0)", "GPU3 (0000:13:00.0)"]
    host.take(await host.look(held={GpuId("GPU-2")}, forget=True))
    assert [lost.name for lost in host.lost] == ["GPU2 (0000:12:00.0)"]
    await host.close()


async def test_a_look_while_nvml_is_silent_changes_nothing(answers: Path) -> None:
    host = await Host.open(HostConfig())
    answers.write_text(json.dumps({**ONE, "crash": True}))
    assert (await host.look(held=())).inventory is host.inventory
    assert await host.memory() is None
    answers.write_text(json.dumps({**ONE, "hang": True}))
    async with asyncio.timeout(10):
        assert (await host.look(held=())).inventory is host.inventory, (
            "a reload does not wait for what is known to hang"
        )
    await host.close()


async def test_without_nvml_the_kernel_module_still_names_the_gpus(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.write_text(json.dumps({"gpus": [], "fail": "Driver/library version mismatch"}))
    folder = tmp_path / "gpus/0000:18:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t NVIDIA L40S\nGPU UUID: \t GPU-a\n")
    monkeypatch.setattr(host_module, "read_nvidia_proc", lambda: read_below(tmp_path))
    host = await Host.open(HostConfig())
    assert [(gpu.id, gpu.memory_bytes) for gpu in host.inventory.gpus] == [("GPU-a", 0)]
    assert "NVML did not answer at the start" in host.degraded[0]
    assert await host.memory() is None
    await host.close()


def read_below(root: Path) -> Any:
    from l40sd.hardware.nvidia_proc import read_nvidia_proc

    return read_nvidia_proc(root=root)


async def test_the_facts_of_every_model_are_read_as_far_as_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 9}')
    here, gone, remote = ModelName("here"), ModelName("gone"), ModelName("remote")
    config = Config(
        models={
            here: ModelConfig(name=here, source=str(tmp_path)),
            gone: ModelConfig(name=gone, source=str(tmp_path / "gone")),
            remote: ModelConfig(name=remote, engine="external"),
        }
    )
    host = await Host.open(HostConfig(inventory="l40s-8"))
    assert await host.facts(config) == {
        here: ModelFacts(attention_heads=9),
        gone: ModelFacts(missing=True),
        remote: ModelFacts(),
    }
