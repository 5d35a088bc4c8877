"""The whole daemon, as it is started in earnest, on a recorded host; every test ends with nothing left behind."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from daemonkit import Site
from harness import ENGINE, MODEL, SMOLLM2, STOP_S, SiteOf


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("vllm") is None:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture
async def site_of(tmp_path: Path) -> AsyncIterator[SiteOf]:
    """Make sites by their configuration. At the end each daemon is told to stop, and must leave nothing."""
    sites: list[Site] = []

    def make(config: str) -> Site:
        site = Site(folder=tmp_path / f"site{len(sites)}", config=config, programs=(ENGINE / "programs",))
        sites.append(site)
        return site

    yield make
    try:
        for site in sites:
            if site.daemon is not None and site.daemon.poll() is None:
                assert await site.stop(STOP_S) == 0, site.tail()
            assert site.leftovers() == [], site.tail()
            assert site.cgroups() == [], site.tail()
            assert not site.socket.exists()
    finally:
        for site in sites:
            site.clear()


@pytest.fixture
def smollm2() -> str:
    """Configuration of real llama.cpp workers with a real, small model: 12 of them take 1 GB and 6 s on 2 cores."""
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing: run scripts/setup")
    return SMOLLM2
