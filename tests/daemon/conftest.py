"""A real daemon with simulated engines, for the tests of the running parts."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from daemonkit import Site

SiteOf = Callable[[str], Site]


@pytest.fixture
async def site_of(tmp_path: Path) -> AsyncIterator[SiteOf]:
    """Make sites by their configuration; in the end each daemon is stopped and must leave nothing behind."""
    sites: list[Site] = []

    def make(config: str) -> Site:
        site = Site(folder=tmp_path / f"site{len(sites)}", config=config)
        sites.append(site)
        return site

    yield make
    try:
        for site in sites:
            if site.daemon is not None and site.daemon.poll() is None:
                assert await site.stop(60) == 0, site.tail()
            assert site.leftovers() == [], site.tail()
    finally:
        for site in sites:
            site.clear()
