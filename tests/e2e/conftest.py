"""The whole daemon, as it is started in earnest, on a recorded host; every test ends with nothing left behind."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from daemonkit import SiteOf, sites
from harness import ENGINE, MODEL, SMOLLM2, STOP_S


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("vllm") is None:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture
async def site_of(tmp_path: Path) -> AsyncIterator[SiteOf]:
    """Make sites by their configuration; each must end well and leave nothing behind."""
    async with sites(tmp_path, programs=(ENGINE / "programs",), stop_s=STOP_S) as make:
        yield make


@pytest.fixture
def smollm2() -> str:
    """Configuration of real llama.cpp workers with a real, small model: 12 of them take 1 GB and 6 s on 2 cores."""
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing: run scripts/setup")
    return SMOLLM2
