"""Which GPUs are there: numbers that stay, lost ones, those that are back."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from l40sd.hardware.presence import Failing, Heard, Known
from l40sd.hardware.topology import NvmlGpu
from l40sd.model import GpuId, PciAddress


def gpu(number: int, index: int | None = None, *, uuid: str = "") -> NvmlGpu:
    """Return the GPU in this slot; ``index`` is NVML's number for it at present."""
    return NvmlGpu(
        id=GpuId(uuid or f"GPU-{number}"),
        index=number if index is None else index,
        pci=PciAddress(f"0000:{number:02x}:00.0"),
        name="NVIDIA L40S",
        memory_bytes=48 << 30,
    )


def listed(*slots: int) -> tuple[NvmlGpu, ...]:
    """Return the GPUs in these slots as NVML lists them: numbered without gaps."""
    return tuple(gpu(slot, index) for index, slot in enumerate(sorted(slots)))


slots = st.sets(st.integers(0, 11))


@given(st.lists(slots, min_size=1, max_size=6))
def test_whatever_comes_and_goes_a_gpu_keeps_its_number_and_no_two_share_one(looks: list[set[int]]) -> None:
    """Seen: one GPU less, and every worker behind it had another name."""
    known, numbers = Known(), dict[GpuId, int]()
    for there in looks:
        known = known.with_found(listed(*there))
        now = {each.id: each.index for each in known.gpus.values()}
        assert len(set(now.values())) == len(now)
        assert numbers.items() <= now.items()
        numbers = now
        heard = Heard(answering=listed(*there))
        assert {lost.id for lost in known.lost(heard)} == now.keys() - {GpuId(f"GPU-{slot}") for slot in there}
        assert len(known.offered(heard, used=())) == len(there)
        assert known.offered(heard, used=now.keys()) == ()


@given(slots, slots, slots)
def test_forgetting_leaves_what_is_there_and_what_is_held(before: set[int], there: set[int], held: set[int]) -> None:
    holding = {GpuId(f"GPU-{slot}") for slot in held & before}
    known = Known().with_found(listed(*before)).with_found(listed(*there), held=holding, forget=True)
    assert known.gpus.keys() == {GpuId(f"GPU-{slot}") for slot in there} | holding


def test_a_gpu_keeps_its_number_beside_one_that_was_forgotten() -> None:
    """NVML closes the gap, and its numbers are free."""
    known = Known().with_found(listed(0, 1, 2)).with_found(listed(0, 2), forget=True)
    for _ in range(2):
        known = known.with_found(listed(0, 2))
        assert {each.id: each.index for each in known.gpus.values()} == {"GPU-0": 0, "GPU-2": 2}


def test_a_card_in_the_place_of_another_has_its_number() -> None:
    known = Known().with_found(listed(0, 1, 2)).with_found((gpu(0), gpu(1, uuid="GPU-new"), gpu(2)))
    assert {each.id: each.index for each in known.gpus.values()} == {"GPU-0": 0, "GPU-new": 1, "GPU-2": 2}


def test_a_lost_gpu_is_named_once_with_nvmls_reason_by_its_id_else_by_its_number() -> None:
    known = Known().with_found(listed(0, 1, 2, 3))
    failing = (Failing(number=1, id=GpuId("GPU-1"), reason="GPU is lost"), Failing(number=2, reason="Unknown Error"))
    lost = known.lost(Heard(answering=listed(0), failing=failing))
    assert [(each.name, each.reason) for each in lost] == [
        ("GPU1 (0000:01:00.0)", "GPU is lost"),
        ("GPU2 (0000:02:00.0)", "Unknown Error"),
        ("GPU3 (0000:03:00.0)", "NVML does not list it"),
    ]


def test_a_gpu_that_never_said_who_it_is_is_named_by_its_number() -> None:
    heard = Heard(answering=listed(0), failing=(Failing(number=1, reason="Insufficient Permissions"),))
    assert [(each.name, each.reason) for each in Known().with_found(listed(0)).lost(heard)] == [
        ("GPU1", "Insufficient Permissions")
    ]
    named = replace(heard, failing=(Failing(number=1, id=GpuId("GPU-1"), reason="Insufficient Permissions"),))
    assert len(Known().with_found(listed(0)).lost(named)) == 1
