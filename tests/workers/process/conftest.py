"""After each test nobody and nothing is left, and that is checked."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from processkit import Site, leftovers, open_descriptors

from l40sd.shim import proc
from l40sd.workers.process.containment import Unavailable, probe_cgroup


@pytest.fixture(params=["none", "cgroup"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    """One for each provider that works on this host."""
    if request.param == "cgroup":
        try:
            os.rmdir(probe_cgroup(tmp_path / "probe").base)  # noqa: PTH106
        except Unavailable as reason:
            pytest.skip(f"no cgroup provider here: {reason}")
    site = Site(tmp_path, request.param)
    await asyncio.to_thread(lambda: None)  # the loop's thread and its pipe are not a leak
    descriptors = open_descriptors()
    yield site
    for processes in site.opened:
        await processes.close()
    left = await leftovers(site)
    for process in left:
        proc.send_signal(process, signal.SIGKILL)
    assert not left, "processes are left"
    assert not [path for path in site.groups() if path.exists()], "cgroups are left"
    assert open_descriptors() == descriptors, "file descriptors are left"
