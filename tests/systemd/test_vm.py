"""What needs a machine of one's own: NUMA nodes, PCIe switches, cgroup controllers, a clock and memory to spoil."""

import json
from collections.abc import Callable, Iterator

import pytest
import vmfaults
from disk import Disk, build_disk, missing_vm_tools
from pcie import LAYOUTS, Layout, links, numa_nodes
from sysrecord import FIXTURES, record
from vm import CPUS, Machine
from vmdaemon import Daemon

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

CPUS_OF_NODE = {0: f"0-{CPUS // 2 - 1}", 1: f"{CPUS // 2}-{CPUS - 1}"}
on_every_layout = pytest.mark.parametrize("daemon", LAYOUTS, indirect=True, scope="session")
on_one_layout = pytest.mark.parametrize("daemon", ["4+2"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def disk() -> Disk:
    if reason := missing_vm_tools():
        pytest.skip(reason)
    return build_disk()


@pytest.fixture(scope="session")
def daemon(request: pytest.FixtureRequest, disk: Disk) -> Iterator[Daemon]:
    """The daemon in a machine with one of the layouts, one machine at a time."""
    with Machine(disk, LAYOUTS[request.param]) as machine:
        yield Daemon(machine)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of the machine's layout."""
    found: str = request.node.callspec.params["daemon"]
    return found


@pytest.fixture
def layout(name: str) -> Layout:
    return LAYOUTS[name]


@on_every_layout
def test_the_topology_read_from_a_real_pci_tree_is_the_layout(daemon: Daemon, layout: Layout) -> None:
    daemon.serve()
    topology = daemon.get("/v1/topology")
    assert topology["is_live"]
    assert [gpu["pci"] for gpu in topology["gpus"]] == daemon.devices()
    assert [gpu["numa_node"] for gpu in topology["gpus"]] == numa_nodes(layout)
    assert [gpu["cpus"] for gpu in topology["gpus"]] == [CPUS_OF_NODE[node] for node in numa_nodes(layout)]
    assert topology["matrix"] == links(layout)
    assert [(node, cpus) for node, cpus, _ in topology["numa_nodes"]] == list(CPUS_OF_NODE.items())


@on_every_layout
def test_what_is_recorded_for_the_tests_without_a_machine_is_what_it_answers(
    daemon: Daemon, name: str, layout: Layout
) -> None:
    recorded = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    assert (recorded["links"], recorded["numa_nodes"]) == (links(layout), numa_nodes(layout))
    here = record(daemon.machine)
    sizes = {path for path in here if path.endswith("/meminfo")}  # the kernel's own share differs from build to build
    assert {p: t for p, t in here.items() if p not in sizes} == {
        p: t for p, t in recorded["sys"].items() if p not in sizes
    }


@on_every_layout
def test_workers_run_on_the_cpus_and_memory_of_their_gpus(daemon: Daemon, layout: Layout) -> None:
    """numactl bound them before they allocated anything: the kernel's own account, for the engine and its ranks."""
    workers = daemon.serve().values()
    nodes = [numa_nodes(layout)[worker["gpus"][0]] for worker in workers]
    assert nodes == [0, 1]
    for node, worker in zip(nodes, workers, strict=True):
        assert {numa_nodes(layout)[gpu] for gpu in worker["gpus"]} == {node}
        assert worker["cpus"] == CPUS_OF_NODE[node]
        for pid in daemon.machine.output(f"cat {daemon.group(worker)}/cgroup.procs").split():
            assert_is_bound(daemon, pid, CPUS_OF_NODE[node], node)


@on_one_layout
def test_workers_on_one_node_share_no_core(daemon: Daemon) -> None:
    """Two GPUs on a node of two cores: one core each, from `--physcpubind`, and the node's memory."""
    daemon.configure(gpus=(0, 4, 6, 10), count=4, tp=1)
    try:
        workers = list(daemon.serve().values())
        assert [worker["cpus"] for worker in workers] == ["0", "1", "2", "3"]
        for cpu, worker in enumerate(workers):
            assert_is_bound(daemon, worker["pid"], str(cpu), cpu // 2)
    finally:
        daemon.configure()


def assert_is_bound(daemon: Daemon, pid: str, cpus: str, node: int) -> None:
    """See to it that the kernel has a process bound so: its CPUs, its memory policy, and where its heap is."""
    status = daemon.machine.output(f"cat /proc/{pid}/status")
    assert f"Cpus_allowed_list:\t{cpus}\n" in status
    maps = daemon.machine.output(f"cat /proc/{pid}/numa_maps").splitlines()
    assert maps
    assert all(line.split()[1] == f"bind:{node}" for line in maps)
    (heap,) = (line for line in maps if " heap " in line)
    assert f" N{node}=" in heap
    assert f" N{1 - node}=" not in heap


@on_one_layout
@pytest.mark.parametrize("number", sorted(vmfaults.FAULTS))
def test_it_survives(daemon: Daemon, number: int, say: Callable[[str], None]) -> None:
    """Also injected by `scripts/faults`, which see for what each is."""
    survived = vmfaults.FAULTS[number](daemon)
    say(f"fault {number} survived in the virtual machine in {survived.took_s:.1f} s: {survived.note}")
