"""A real daemon with simulated engines, for the tests of the running parts."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from daemonkit import SiteOf, sites


@pytest.fixture
async def site_of(tmp_path: Path) -> AsyncIterator[SiteOf]:
    """Make sites by their configuration; each must end well and leave nothing behind."""
    async with sites(tmp_path) as make:
        yield make
