"""PCIe layouts for the virtual machine: as qemu's arguments, and as what l40sd must make of them.

A stand-in for a GPU is qemu's `edu` device (1234:11e8): a PCI function with a memory BAR and no driver. What matters
here is where it hangs, and for that one device is as good as another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

STAND_IN = ("0x1234", "0x11e8")
"""Vendor and device, as /sys writes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A PCIe switch: so many GPUs, and switches below it."""

    gpus: int = 0
    below: tuple["Switch", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """A host bridge with the switches below it, each on a root port of its own."""

    numa_node: int
    switches: tuple[Switch, ...]


Layout = tuple[Bridge, ...]

LAYOUTS: dict[str, Layout] = {
    # As the bundled host l40s-12-4+2: on each socket a switch of four and one of two, each on its own host bridge.
    "4+2": tuple(Bridge(numa_node=node, switches=(Switch(gpus=count),)) for node in (0, 1) for count in (4, 2)),
    # Every kind of link: below one host bridge two cascaded switches of two and, on another port, a third.
    "cascade": (
        Bridge(numa_node=0, switches=(Switch(below=(Switch(gpus=2), Switch(gpus=2))), Switch(gpus=2))),
        Bridge(numa_node=1, switches=(Switch(gpus=4),)),
        Bridge(numa_node=1, switches=(Switch(gpus=2),)),
    ),
}


def numa_nodes(layout: Layout) -> list[int]:
    """Return each GPU's NUMA node, in the order of the PCI addresses."""
    return [layout[place[0]].numa_node for place in _places(layout)]


def links(layout: Layout) -> list[list[str]]:
    """Return the matrix that `nvidia-smi topo -m` would print for real GPUs at these places."""
    places = list(_places(layout))
    return [[_letters(layout, one, other) for other in places] for one in places]


def arguments(layout: Layout) -> list[str]:
    """Return qemu's arguments.

    No device has an I/O BAR and no root port reserves I/O space: so many bridges would use up all 64 KiB of it.
    """
    devices: list[str] = []
    ports = iter(range(1, 256))
    numbers = iter(range(256))

    def add_switch(switch: Switch, bus: str) -> None:
        name = f"switch{next(numbers)}"
        devices.append(f"x3130-upstream,id={name},bus={bus}")
        for slot, below in enumerate([*[None] * switch.gpus, *switch.below]):
            port = f"{name}-{slot}"
            place = f"bus={name},chassis={next(ports)},slot={slot},addr={slot}.0"
            devices.append(f"xio3130-downstream,id={port},{place}")
            if below is None:
                devices.append(f"edu,bus={port}")
            else:
                add_switch(below, port)

    step = 0xE0 // (len(layout) + 1)  # bus numbers for what is below each host bridge
    for number, bridge in enumerate(layout):
        first_bus = (number + 1) * step
        devices.append(f"pxb-pcie,id=bridge{number},bus=pcie.0,bus_nr={first_bus:#x},numa_node={bridge.numa_node}")
        for slot, switch in enumerate(bridge.switches):
            port = f"root{number}-{slot}"
            place = f"bus=bridge{number},chassis={next(ports)},slot={slot},addr={slot}.0"
            devices.append(f"pcie-root-port,id={port},{place},io-reserve=0")
            add_switch(switch, port)
    return [word for device in devices for word in ("-device", device)]


def _places(layout: Layout) -> Iterator[tuple[int, ...]]:
    """Yield the way to each GPU: number of its host bridge, of the switch below that, and so on."""

    def below(switch: Switch, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        yield from [place] * switch.gpus
        for number, lower in enumerate(switch.below):
            yield from below(lower, (*place, number))

    for number, bridge in enumerate(layout):
        for port, switch in enumerate(bridge.switches):
            yield from ((*place, gpu) for gpu, place in enumerate(below(switch, (number, port))))


def _letters(layout: Layout, one: tuple[int, ...], other: tuple[int, ...]) -> str:
    """Compare two places; the last number of each is the GPU's own."""
    if one == other:
        return "X"
    if one[0] != other[0]:
        return "NODE" if layout[one[0]].numa_node == layout[other[0]].numa_node else "SYS"
    if one[1] != other[1]:
        return "PHB"
    return "PIX" if one[:-1] == other[:-1] else "PXB"
