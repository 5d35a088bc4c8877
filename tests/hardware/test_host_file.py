"""Host files, bundled hosts, and the text of nvidia-smi as people paste it."""

from dataclasses import replace
from pathlib import Path

import pytest
from hosts import tree_hosts
from hypothesis import given
from hypothesis import strategies as st

from l40sd.errors import ConfigError, L40sError
from l40sd.hardware.cpus import cores_of, format_cpu_list
from l40sd.hardware.host_file import format_host_file, parse_host_file
from l40sd.hardware.topology import links_of, pci_order
from l40sd.model import Gpu, GpuId, Inventory, Link, NumaNode, PciAddress

FIXTURES = Path(__file__).parents[1] / "fixtures"
HOSTS = Path(__file__).parents[2] / "l40sd/sim/hosts"
TEXTS = sorted((FIXTURES / "topo").glob("*.txt"))

cpu_sets = st.frozensets(st.integers(0, 300), max_size=20)
pcis = st.builds("{:04x}:{:02x}:{:02x}.{}".format, *(st.integers(0, n) for n in (0x1FFFF, 255, 31, 7)))
texts = st.text(max_size=20)


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    """Any host at all, sensible or not."""
    nodes = tuple(
        NumaNode(id=number, cpus=cpus, memory_bytes=draw(st.integers(0, 1 << 42)), cores=cores_of(cpus))
        for number, cpus in draw(st.dictionaries(st.integers(0, 300), cpu_sets, max_size=4)).items()
    )
    addresses = draw(st.lists(pcis, min_size=1, max_size=6, unique=True))
    gpus = [
        Gpu(
            id=GpuId(f"GPU-{number}-{draw(texts)}"),
            index=number,
            pci=PciAddress(pci),
            name=draw(texts),
            memory_bytes=draw(st.integers(0, 1 << 40)),
            numa_node=draw(st.sampled_from([None, *(node.id for node in nodes)])),
            cpus=draw(cpu_sets),
            path=tuple(PciAddress(p) for p in draw(st.lists(st.sampled_from(["pci0000:00", *addresses]), max_size=3))),
        )
        for number, pci in enumerate(addresses)
    ]
    gpus.sort(key=lambda gpu: pci_order(gpu.pci))
    links = links_of(gpus, nodes)
    for pair in links:
        if draw(st.booleans()):
            links[pair] = links[pair[::-1]] = draw(st.sampled_from(list(Link)[1:]))
    return Inventory(host=draw(texts), source="", gpus=tuple(gpus), numa_nodes=nodes, links=links)


@given(inventories())
def test_a_written_host_reads_back_the_same(inventory: Inventory) -> None:
    assert parse_host_file(format_host_file(inventory), source="") == inventory


@given(tree_hosts(12))
def test_a_host_whose_bridges_tell_all_needs_no_matrix(inventory: Inventory) -> None:
    text = format_host_file(inventory)
    assert "[links]" not in text
    assert parse_host_file(text, source="test") == inventory


def test_cores_that_the_cpu_list_does_not_tell_are_written_too() -> None:
    cores = (frozenset({0, 1}), frozenset({2, 3}))  # siblings side by side, as some firmware numbers them
    node = NumaNode(id=0, cpus=frozenset(range(4)), cores=cores)
    gpu = Gpu(id=GpuId("GPU-a"), index=0, pci=PciAddress("0000:01:00.0"), name="x", memory_bytes=0, numa_node=0)
    inventory = Inventory(host="h", source="", gpus=(gpu,), numa_nodes=(node,), links={})
    assert parse_host_file(format_host_file(inventory), source="").numa_nodes == (node,)


@pytest.mark.parametrize("file", sorted(HOSTS.glob("*.toml")), ids=lambda file: file.stem)
def test_bundled_hosts_read_as_what_their_names_say(file: Path) -> None:
    host = parse_host_file(file.read_text(), source="bundled")
    assert host.host == file.stem
    assert len(host.gpus) == int(file.stem.split("-")[1])
    assert {gpu.memory_bytes for gpu in host.gpus} == {46068 << 20}
    assert not host.is_live


def shape(name: str) -> list[list[int]]:
    """GPU counts of each PCIe switch, socket by socket."""
    host = parse_host_file((HOSTS / f"{name}.toml").read_text(), source="")
    found: dict[int | None, dict[tuple[str, ...], int]] = {}
    for gpu in host.gpus:
        switches = found.setdefault(gpu.numa_node, {})
        switches[gpu.path[:-1]] = switches.get(gpu.path[:-1], 0) + 1
    return [list(switches.values()) for switches in found.values()]


def test_bundled_switches_hold_what_the_documents_say() -> None:
    assert shape("l40s-12-4+2") == [[4, 2], [4, 2]]
    assert shape("l40s-12-8+4") == [[8], [4]]
    assert shape("l40s-8") == [[4], [4]]
    assert shape("l40s-11-awkward") == [[3, 2], [3, 1, 2]]


def test_a_short_host_file_is_enough() -> None:
    host = parse_host_file('[[numa_nodes]]\nid = 4\ncpus = "0-3"\n[[gpus]]\nnuma_node = 4\n[[gpus]]\n', source="f")
    assert [gpu.index for gpu in host.gpus] == [0, 1]
    assert host.gpus[0].cpus == {0, 1, 2, 3}
    assert len({gpu.id for gpu in host.gpus}) == 2
    assert host == parse_host_file(
        '[[numa_nodes]]\nid = 4\ncpus = "0-3"\n[[gpus]]\nnuma_node = 4\n[[gpus]]\n', source="f"
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("host = 3\n[[gpus]]", "host: 3 is not a text"),
        ("[[gpus]]\ncolour = 'red'", r"gpus\[0\].colour: unknown key"),
        ("[[gpus]]\npci = 'x'", r"gpus\[0\].pci: 'x' is not a PCI address"),
        ("[[gpus]]\nnuma_node = 7", "there is no NUMA node 7"),
        ("[[gpus]]\nindex = 1\n[[gpus]]\nindex = 1", "index: 1 more than once"),
        ("[[numa_nodes]]\ncpus = '3-1'\n[[gpus]]", "neither a CPU"),
        ("gpus = 3", "gpus: 3 is not a list"),
        ("host = 'x'", "0 GPUs"),
        ("[[gpus]]\n[links]\nrows = ['X PIX']", "not a square"),
        ("[[gpus]]\n[[gpus]]\n[links]\nrows = ['X PIX', 'FAR X']", "'FAR' between GPU1 and GPU0"),
        ("GPU0 is a word\n= 3", "not a host file"),
        ("[[gpus]]\nmemory_mib = true", "True is not a whole number"),
        ("[[gpus]]\nmemory_mib = -1", "negative"),
    ],
)
def test_a_bad_host_file_is_refused_with_its_place(text: str, what: str) -> None:
    with pytest.raises(L40sError, match=what) as caught:
        parse_host_file(text, source="my.toml")
    assert "my.toml" in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_host_file("[[gpus]]\npci = 'x'\ncolour = 1\n", source="my.toml")
    assert len(caught.value.problems) == 2


@given(st.text(max_size=200))
def test_any_text_is_a_host_or_an_error_for_the_operator(text: str) -> None:
    try:
        parse_host_file(text, source="x")
    except L40sError:
        return


# -- nvidia-smi topo -m --------------------------------------------------------------------------------------------


def pasted(name: str) -> Inventory:
    return parse_host_file((FIXTURES / "topo" / f"{name}.txt").read_text(), source=name)


def matrix(host: Inventory) -> list[str]:
    return [" ".join(host.link(a.id, b.id).name for b in host.gpus) for a in host.gpus]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.stem)
def test_every_published_matrix_is_read_and_survives_as_toml(file: Path) -> None:
    host = parse_host_file(file.read_text(), source="")
    assert [gpu.index for gpu in host.gpus] == list(range(len(host.gpus)))
    assert parse_host_file(format_host_file(host), source="") == host


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.stem)
def test_tabs_that_a_terminal_made_spaces_change_nothing(file: Path) -> None:
    assert parse_host_file(file.read_text().expandtabs(), source="") == parse_host_file(file.read_text(), source="")


def test_nics_affinities_and_nvlinks_are_told_apart() -> None:
    host = pasted("accelmark_h200_x8")
    assert set(host.links.values()) == {Link.NV}
    assert [gpu.numa_node for gpu in host.gpus] == [0, 0, 0, 1, 2, 2, 2, 3]
    assert format_cpu_list(host.gpus[3].cpus) == "24-47,120-143"
    assert [node.id for node in host.numa_nodes] == [0, 1, 2, 3]


def test_ansi_underlines_around_the_header_are_no_part_of_it() -> None:
    host = pasted("rtx6kpro_asus_esc8000a_8x_rtxpro6000_ansi")
    assert matrix(host)[6] == "SYS SYS SYS SYS NODE NODE X PIX"
    assert format_cpu_list(host.gpus[7].cpus) == "64-127,192-238"


def test_a_matrix_without_affinity_columns_has_links_only() -> None:
    host = pasted("doc_8gpu_2root_4leaf_switches")
    assert matrix(host)[2] == "PXB PXB X PIX NODE NODE NODE NODE"
    assert host.numa_nodes == ()
    assert all(gpu.numa_node is None and not gpu.cpus for gpu in host.gpus)


def test_an_empty_column_of_cpus_leaves_the_numa_nodes_what_they_are() -> None:
    """Seen: NUMA node 1 was taken for CPU 1, and the GPU bound to it."""
    host = pasted("no_cpu_affinity_2gpu")
    assert [(gpu.numa_node, gpu.cpus) for gpu in host.gpus] == [(0, frozenset()), (1, frozenset())]


def test_an_odd_host_keeps_its_lonely_gpu() -> None:
    host = pasted("issue_5gpu_phb_node_sys")
    assert matrix(host) == ["X SYS SYS SYS SYS", "SYS X PHB NODE NODE", "SYS PHB X NODE NODE",
                            "SYS NODE NODE X PHB", "SYS NODE NODE PHB X"]  # fmt: skip
    assert [gpu.numa_node for gpu in host.gpus] == [1, 0, 0, 0, 0]


def test_a_shell_prompt_and_windows_line_ends_do_not_matter() -> None:
    text = (FIXTURES / "topo/issue_l40s_x4_nic2.txt").read_text()
    pasted_from_elsewhere = "root@host:~# nvidia-smi topo -m\r\n" + text.replace("\n", "\r\n") + "root@host:~#"
    assert parse_host_file(pasted_from_elsewhere, source="") == parse_host_file(text, source="")


def test_an_old_drivers_soc_is_sys() -> None:
    header = "\tGPU0\tGPU1\tmlx5_0\tCPU Affinity\n"
    text = f"{header}GPU0\t X \tSOC\tPHB\t0-7\nGPU1\tSOC\t X \tSOC\t8-15\nmlx5_0\tPHB\tSOC\t X \n"
    assert matrix(parse_host_file(text, source="")) == ["X SYS", "SYS X"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("GPU0 X PIX\nGPU1 PIX X", "no header"),
        ("  GPU0 GPU1\nGPU0 X PIX", "columns for GPUs"),
        ("  GPU0 GPU1\nGPU0 X\nGPU1 PIX X", "ends early"),
        ("  GPU0 GPU1\nGPU0 X PIX\nGPU1 HUH X", "columns for GPUs|'HUH'"),
    ],
)
def test_a_matrix_that_was_cut_says_where(text: str, what: str) -> None:
    with pytest.raises(L40sError, match=what):
        parse_host_file(text, source="paste")


def test_the_machine_with_one_gpu_that_we_recorded_is_read() -> None:
    text = (FIXTURES / "nvml_h200/nvidia-smi-topo.txt").read_text()
    host = parse_host_file(text, source="")
    assert len(host.gpus) == 1
    assert format_cpu_list(host.gpus[0].cpus) == "0-15"
    assert replace(host.gpus[0], cpus=frozenset()).numa_node == 0


def test_the_machine_with_four_gpus_is_to_us_what_it_is_to_nvidia_smi() -> None:
    """Recorded on it by ``scripts/gpu-check --record``: ours from NVML and /sys, and nvidia-smi's own words."""
    ours = parse_host_file((FIXTURES / "nvml_h200x4/host.toml").read_text(), source="")
    theirs = parse_host_file((FIXTURES / "nvml_h200x4/nvidia-smi-topo.txt").read_text(), source="")
    assert matrix(ours) == matrix(theirs) == ["X NV NV NV", "NV X NV NV", "NV NV X NV", "NV NV NV X"]
    assert [(gpu.numa_node, gpu.cpus) for gpu in ours.gpus] == [(gpu.numa_node, gpu.cpus) for gpu in theirs.gpus]
