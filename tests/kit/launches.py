"""A small live host and the layouts that every engine is asked to run on it."""

from collections.abc import Mapping

from l40sd.config.options import Config, EngineConfig, HostConfig, ModelConfig, WorkersConfig
from l40sd.model import Gpu, GpuId, Inventory, Link, ModelName, NumaNode, PciAddress, Placement, WorkerId

MODEL = ModelName("llama")


def gpu_id(index: int) -> GpuId:
    return GpuId(f"GPU-{index:08x}-0000-0000-0000-000000000000")


def host(*, is_live: bool = True, links: Mapping[tuple[int, int], Link] | None = None) -> Inventory:
    """Two sockets of two GPUs each; a pair shares a PCIe switch, the pairs are a socket apart."""
    cpus = {0: frozenset(range(8)), 1: frozenset(range(8, 16))}
    gpus = tuple(
        Gpu(
            id=gpu_id(index),
            index=index,
            pci=PciAddress(f"0000:{index + 1:02x}:00.0"),
            name="NVIDIA L40S",
            memory_bytes=46068 << 20,
            numa_node=index // 2,
            cpus=cpus[index // 2],
        )
        for index in range(4)
    )
    pairs = {(a, b): Link.PIX if a // 2 == b // 2 else Link.SYS for a in range(4) for b in range(4) if a != b}
    pairs |= links or {}
    return Inventory(
        host="test",
        source="nvml",
        gpus=gpus,
        numa_nodes=tuple(NumaNode(id=node, cpus=cpus[node]) for node in cpus),
        links={(gpu_id(a), gpu_id(b)): link for (a, b), link in pairs.items()},
        is_live=is_live,
    )


def placement(tp: int = 1, pp: int = 1, *, endpoint: str = "", first: int = 0) -> Placement:
    """The first GPUs of the host, whole NUMA nodes except for a single GPU, which gets half of one."""
    ranks = range(first, first + tp * pp)
    nodes = tuple(sorted({rank // 2 for rank in ranks}))
    cpus = (
        frozenset(range(4))
        if len(ranks) == 1
        else frozenset(cpu for node in nodes for cpu in range(8 * node, 8 * node + 8))
    )
    return Placement(
        worker=WorkerId("llama-gpu" + "-".join(map(str, ranks))),
        model=MODEL,
        tp=tp,
        pp=pp,
        gpus=() if endpoint else tuple(gpu_id(rank) for rank in ranks),
        cpus=frozenset() if endpoint else cpus,
        memory_nodes=() if endpoint else nodes,
        endpoint=endpoint,
    )


def config(
    engine: str,
    *,
    engines: Mapping[str, EngineConfig] | None = None,
    host_config: HostConfig | None = None,
    workers: WorkersConfig | None = None,
    **model: object,
) -> Config:
    values = {"source": "/models/llama", "aliases": ("gpt-4o-mini",), "args": ("--seed", "7"), **model}
    return Config(
        host=host_config or HostConfig(),
        workers=workers or WorkersConfig(),
        engines=engines or {},
        models={MODEL: ModelConfig(name=MODEL, engine=engine, **values)},  # type: ignore[arg-type]
    )
