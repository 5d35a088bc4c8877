"""The virtual machine of tests/systemd, for the faults that would take this machine down, or that it cannot show.

Booted when the first of them comes and kept for the others; after one that is not survived the next gets a fresh one.
"""

import asyncio
import atexit
import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.rig import Rig
from faults.suite import NotHereError, Outcome

SYSTEMD_TESTS = Path(__file__).resolve().parents[1] / "systemd"
_kept = contextlib.ExitStack()
_daemons: list[Any] = []
atexit.register(_kept.close)


async def inject(rig: Rig, number: int) -> Outcome:
    """Inject a fault in the virtual machine.

    Raises:
        NotHereError: There can be none here, or none with ``--quick``.
    """
    if str(SYSTEMD_TESTS) not in sys.path:
        sys.path.insert(0, str(SYSTEMD_TESTS))
    from disk import missing_vm_tools

    if reason := missing_vm_tools():
        raise NotHereError(f"needs the virtual machine: {reason}")
    if rig.is_quick:
        raise NotHereError("needs the virtual machine: left out with --quick")
    return await asyncio.to_thread(_inject, number)


async def inject_too(rig: Rig, number: int, here: Outcome) -> Outcome:
    """Return what was seen here, with what the virtual machine adds to it; where there is none, that."""
    if rig.is_quick:
        return here
    try:
        there = await inject(rig, number)
    except NotHereError as reason:
        return replace(here, note=f"{here.note}; {reason}")
    added = f"in a virtual machine {there.took_s:.1f} s: {there.note}"
    return replace(here, lost=here.lost + there.lost, note=f"{here.note}; {added}" if here.note else added)


def _inject(number: int) -> Outcome:
    import vmfaults

    try:
        survived = vmfaults.FAULTS[number](_daemon())
    except BaseException:
        _daemons.clear()
        _kept.close()
        raise
    return Outcome(took_s=survived.took_s, lost=survived.lost, note=survived.note)


def _daemon() -> Any:
    from disk import build_disk
    from pcie import LAYOUTS
    from vm import Machine
    from vmdaemon import Daemon

    if not _daemons:
        _daemons.append(Daemon(_kept.enter_context(Machine(build_disk(), LAYOUTS["4+2"]))))
    return _daemons[0]
