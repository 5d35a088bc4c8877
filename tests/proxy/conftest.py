"""A proxy with fake workers on loopback; every test runs on uvloop and on asyncio's own loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import uvloop
from proxykit import Stand


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
async def stand() -> AsyncIterator[Callable[..., Any]]:
    """Start a proxy with a configuration of one's own; at the end nothing may be held any more."""
    stands: list[Stand] = []

    async def start(**options: Any) -> Stand:
        new = Stand(**options)
        stands.append(new)
        await new.start()
        return new

    yield start
    for each in stands:
        await each.finish()
