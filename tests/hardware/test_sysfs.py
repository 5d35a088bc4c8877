"""/sys trees, whole and broken, and the kernel module's own list of GPUs."""

import json
from pathlib import Path

import pytest
from systrees import Recorded, tree_of_inventory, write_tree

from l40sd.hardware.host_file import parse_host_file
from l40sd.hardware.nvidia_proc import read_nvidia_proc
from l40sd.hardware.sysfs import read_sysfs
from l40sd.hardware.topology import NvmlFacts, NvmlGpu, PciFacts, SysfsFacts, join
from l40sd.model import GpuId, Inventory, PciAddress

FIXTURES = Path(__file__).parents[1] / "fixtures"
HOSTS = sorted((Path(__file__).parents[2] / "l40sd/sim/hosts").glob("*.toml"))
PCIE = sorted((FIXTURES / "pcie").glob("*.json"))
H200 = PciAddress("0000:00:06.0")


def as_nvml(host: Inventory) -> NvmlFacts:
    return NvmlFacts(
        gpus=tuple(
            NvmlGpu(id=gpu.id, index=gpu.index, pci=gpu.pci, name=gpu.name, memory_bytes=gpu.memory_bytes)
            for gpu in host.gpus
        )
    )


@pytest.mark.parametrize("file", HOSTS, ids=lambda file: file.stem)
def test_a_machine_shows_the_same_host_as_its_host_file(file: Path, tmp_path: Path) -> None:
    host = parse_host_file(file.read_text(), source="nvml")
    root = write_tree(tmp_path, tree_of_inventory(host))
    found = join(host.host, as_nvml(host), read_sysfs([gpu.pci for gpu in host.gpus], root=root))
    assert found.gpus == host.gpus
    assert found.numa_nodes == host.numa_nodes
    assert found.links == host.links
    assert found.is_live


def test_a_recorded_virtual_machine_is_read(tmp_path: Path) -> None:
    """numa_node is -1 there and the PCI tree is flat; the local CPUs still tell the NUMA node."""
    root = write_tree(tmp_path, json.loads((FIXTURES / "nvml_h200/sys.json").read_text()))
    facts = read_sysfs([H200], root=root)
    assert facts.devices[H200] == PciFacts(path=(PciAddress("pci0000:00"),), numa_node=None, cpus=frozenset(range(16)))
    assert [(node.id, len(node.cpus), len(node.cores)) for node in facts.numa_nodes] == [(0, 16, 16)]
    nvml = NvmlFacts(gpus=read_nvidia_proc(root=_proc(tmp_path)))
    (gpu,) = join("vm", nvml, facts).gpus
    assert (gpu.pci, gpu.numa_node, gpu.name) == (H200, 0, "NVIDIA H200")


@pytest.mark.parametrize("file", PCIE, ids=lambda file: file.stem)
def test_a_recorded_pci_tree_is_read_as_it_was_built(file: Path, tmp_path: Path) -> None:
    """A kernel's own answers for switches that we laid out; see tests/fixtures/pcie."""
    recorded = json.loads(file.read_text())
    tree = recorded["sys"]
    sysfs = read_sysfs(stand_ins(tree), root=write_tree(tmp_path, tree))
    assert [sysfs.devices[pci].numa_node for pci in stand_ins(tree)] == recorded["numa_nodes"]
    found = join("vm", as_nvml_of_stand_ins(tree), sysfs)
    assert len(found.gpus) == 12
    assert [[found.link(one.id, other.id).name for other in found.gpus] for one in found.gpus] == recorded["links"]
    assert [gpu.numa_node for gpu in found.gpus] == recorded["numa_nodes"]
    cpus = {0: {0, 1}, 1: {2, 3}}
    assert [gpu.cpus for gpu in found.gpus] == [cpus[node] for node in recorded["numa_nodes"]]
    assert [(node.id, node.cpus, len(node.cores)) for node in found.numa_nodes] == [(0, {0, 1}, 2), (1, {2, 3}, 2)]
    assert all(900 < node.memory_bytes >> 20 < 1024 for node in found.numa_nodes)


def test_a_pci_tree_built_like_a_bundled_host_has_its_links() -> None:
    bundled = parse_host_file((HOSTS[0].parent / "l40s-12-4+2.toml").read_text(), source="bundled")
    recorded = json.loads((FIXTURES / "pcie/4+2.json").read_text())
    ids = [gpu.id for gpu in bundled.gpus]
    assert [[bundled.link(one, other).name for other in ids] for one in ids] == recorded["links"]
    assert [gpu.numa_node for gpu in bundled.gpus] == recorded["numa_nodes"]


def stand_ins(tree: Recorded) -> list[PciAddress]:
    """Return the recorded devices that stand in for GPUs: qemu's `edu`."""
    here = "bus/pci/devices/"
    vendors = (path.removeprefix(here).removesuffix("/vendor") for path, text in tree.items() if text == "0x1234\n")
    return sorted(PciAddress(pci) for pci in vendors if tree[f"{here}{pci}/device"] == "0x11e8\n")


def as_nvml_of_stand_ins(tree: Recorded) -> NvmlFacts:
    return NvmlFacts(
        gpus=tuple(
            NvmlGpu(id=GpuId(f"GPU-{index}"), index=index, pci=pci, name="NVIDIA L40S", memory_bytes=48 << 30)
            for index, pci in enumerate(stand_ins(tree))
        )
    )


def test_without_sys_nothing_is_known_and_nothing_fails(tmp_path: Path) -> None:
    assert read_sysfs([H200], root=tmp_path / "nowhere") == SysfsFacts(devices={})


def test_a_kernel_that_writes_nonsense_says_nothing(tmp_path: Path) -> None:
    entry = f"bus/pci/devices/{H200}"
    tree = {
        entry: {"link": f"../../../devices/pci0000:00/{H200}"},
        f"{entry}/numa_node": "many\n",
        f"{entry}/local_cpulist": "all of them\n",
        "devices/system/node/node3/cpulist": "8-4\n",
        "devices/system/node/node3/meminfo": "",
        "devices/system/node/possible": "0-3\n",
    }
    facts = read_sysfs([H200], root=write_tree(tmp_path, tree))
    assert facts.devices[H200] == PciFacts(path=(PciAddress("pci0000:00"),))
    assert [(node.id, node.cpus, node.memory_bytes) for node in facts.numa_nodes] == [(3, frozenset(), 0)]


def test_a_sibling_that_is_offline_is_no_part_of_its_core(tmp_path: Path) -> None:
    tree = {
        "devices/system/node/node0/cpulist": "0-2\n",
        "devices/system/cpu/cpu0/topology/thread_siblings_list": "0,2\n",
        "devices/system/cpu/cpu1/topology/thread_siblings_list": "1,3\n",
        "devices/system/cpu/cpu2/topology/thread_siblings_list": "0,2\n",
    }
    (node,) = read_sysfs([], root=write_tree(tmp_path, tree)).numa_nodes
    assert node.cores == ({0, 2}, {1})


def test_the_bridges_of_a_real_device_here_are_read() -> None:
    """Whatever this machine is: a path is made of bridges only, and does not name the device itself."""
    devices = [PciAddress(path.name) for path in Path("/sys/bus/pci/devices").glob("*")]
    for pci, facts in read_sysfs(devices).devices.items():
        assert pci not in facts.path
        assert not facts.path or facts.path[0].startswith("pci")


def _proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc/gpus" / H200
    folder.mkdir(parents=True)
    (folder / "information").write_text((FIXTURES / "nvml_h200/information").read_text())
    return tmp_path / "proc"


def test_the_kernel_module_knows_its_gpus_by_address(tmp_path: Path) -> None:
    root = _proc(tmp_path)
    for pci, uuid in (("0000:9a:00.0", "GPU-second"), ("0000:01:00.0", "GPU-????????-????-????-????-????????????")):
        (root / "gpus" / pci).mkdir()
        (root / "gpus" / pci / "information").write_text(f"Model: \t\t NVIDIA L40S\nGPU UUID: \t {uuid}\n")
    (root / "gpus/0000:02:00.0").mkdir()
    assert [(gpu.index, gpu.pci, gpu.id) for gpu in read_nvidia_proc(root=root)] == [
        (0, H200, "GPU-5c42327f-53b7-b703-f2d9-660f4e308f90"),
        (1, "0000:9a:00.0", "GPU-second"),
    ]
    assert read_nvidia_proc(root=tmp_path / "none") == ()
