"""How two GPUs are linked, and what an inventory makes of sources that disagree or say nothing."""

import pytest
from hosts import gpus_of, tree_host

from l40sd.errors import L40sError
from l40sd.hardware.topology import NvmlFacts, NvmlGpu, PciFacts, SysfsFacts, join, normal_pci, pci_order, switches_of
from l40sd.model import Gpu, GpuId, Inventory, Link, NumaNode, PciAddress


def letters(inventory: Inventory, one: int, other: int) -> str:
    return inventory.link(*gpus_of(inventory, one, other)).name


def test_every_link_letter_comes_from_what_lies_between() -> None:
    host = tree_host([[[["g", "g"], [["g", "g"], ["g"], "g"]], [["g"]]], [[["g"]]]])
    assert letters(host, 0, 1) == "PIX"  # one switch
    assert letters(host, 2, 3) == "PIX"  # one leaf switch
    assert letters(host, 2, 4) == "PXB"  # two leaf switches of one cascade
    assert letters(host, 2, 5) == "PXB"  # leaf switch and the switch above it
    assert letters(host, 0, 2) == "PHB"  # two root ports
    assert letters(host, 0, 6) == "NODE"  # two host bridges
    assert letters(host, 0, 7) == "SYS"  # two sockets
    assert letters(host, 5, 5) == "X"


def nvml(*pcis: str, links: dict[tuple[int, int], Link] | None = None) -> NvmlFacts:
    gpus = tuple(
        NvmlGpu(id=GpuId(f"GPU-{n}"), index=n, pci=PciAddress(pci), name="NVIDIA L40S", memory_bytes=1)
        for n, pci in enumerate(pcis)
    )
    return NvmlFacts(gpus=gpus, links={(gpus[a].id, gpus[b].id): link for (a, b), link in (links or {}).items()})


def node(number: int, *cpus: int) -> NumaNode:
    return NumaNode(id=number, cpus=frozenset(cpus))


def test_numa_node_minus_one_is_found_by_the_local_cpus() -> None:
    device = PciFacts(path=(PciAddress("pci0000:00"),), cpus=frozenset({4, 5}))
    host = join(
        "h",
        nvml("0000:00:05.0"),
        SysfsFacts(devices={PciAddress("0000:00:05.0"): device}, numa_nodes=(node(0, 0, 1), node(2, 4, 5))),
    )
    assert host.gpus[0].numa_node == 2
    assert host.is_live


def test_numa_node_minus_one_on_a_host_with_one_node_that_has_cpus_is_that_node() -> None:
    host = join("h", nvml("0000:00:05.0"), SysfsFacts(devices={}, numa_nodes=(node(0, 0, 1), node(1))))
    assert host.gpus[0].numa_node == 0


def test_what_nobody_knows_counts_as_the_worst_link() -> None:
    two = SysfsFacts(devices={}, numa_nodes=(node(0, 0), node(1, 1)))
    assert letters(join("h", nvml("0000:01:00.0", "0000:02:00.0"), two), 0, 1) == "SYS"
    one = SysfsFacts(devices={}, numa_nodes=(node(0, 0),))
    assert letters(join("h", nvml("0000:01:00.0", "0000:02:00.0"), one), 0, 1) == "NODE"


def test_flat_pci_of_a_virtual_machine_is_one_host_bridge() -> None:
    flat = PciFacts(path=(PciAddress("pci0000:00"),))
    devices = {PciAddress(pci): flat for pci in ("0000:00:05.0", "0000:00:06.0")}
    assert letters(join("h", nvml(*devices), SysfsFacts(devices=devices)), 0, 1) == "PHB"


def test_nvml_is_believed_before_the_bridges() -> None:
    flat = PciFacts(path=(PciAddress("pci0000:00"),))
    devices = {PciAddress(pci): flat for pci in ("0000:00:05.0", "0000:00:06.0")}
    host = join("h", nvml(*devices, links={(0, 1): Link.NV}), SysfsFacts(devices=devices))
    assert letters(host, 0, 1) == letters(host, 1, 0) == "NV"


def test_gpus_are_in_order_of_their_pci_address_whatever_their_numbers() -> None:
    host = join("h", nvml("0000:c1:00.0", "10000:01:00.0", "0000:0a:00.0"), SysfsFacts(devices={}))
    assert [gpu.index for gpu in host.gpus] == [2, 0, 1]


def test_pci_addresses_are_read_in_every_usual_form() -> None:
    for text in ("00000000:3B:00.0", "0000:3b:00.0", "3b:00.0", " 0000:3B:00.0\n"):
        assert normal_pci(text) == "0000:3b:00.0"
    assert normal_pci("10000:01:00.0") == "10000:01:00.0"
    assert pci_order(PciAddress("10000:01:00.0")) > pci_order(PciAddress("ffff:01:00.0"))
    with pytest.raises(L40sError, match="not a PCI address"):
        normal_pci("3b:00")


def test_shared_parts_are_named_tightest_first() -> None:
    host = tree_host([[[["g", "g"], ["g", "g"]]], [[["g"]]]])
    parts = [(name.rsplit(" ", 1)[0], [host.gpu(g).index for g in gpus]) for name, gpus in switches_of(host)]
    assert parts == [
        ("PCIe switch", [0, 1]),
        ("PCIe switch", [2, 3]),
        ("host bridge", [0, 1, 2, 3]),
        ("NUMA node", [0, 1, 2, 3]),
        ("NUMA node", [4]),
    ]
    assert switches_of(host)[0][0] == f"PCIe switch {host.gpus[0].path[2]}"
    assert switches_of(host)[2][0] == f"host bridge {host.gpus[0].path[0]}"


def test_a_known_path_keeps_a_single_gpu_out_of_every_shared_part() -> None:
    gpu = Gpu(id=GpuId("GPU-a"), index=0, pci=PciAddress("0000:01:00.0"), name="x", memory_bytes=1)
    assert switches_of(Inventory(host="h", source="t", gpus=(gpu,), numa_nodes=(), links={})) == ()
