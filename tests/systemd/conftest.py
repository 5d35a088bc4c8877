"""The containers that the tests share: one with l40sd installed and configured, booted once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from container import Container
from image import Image, build, copy_source, missing_tools

CONFIG = """\
[daemon]
pattern = "A"
orphan_grace_s = 30
stop_timeout_s = 30

[host]
inventory = "l40s-12-4+2"

[workers]
drain_timeout_s = 2
term_timeout_s = 5
start_parallel = 12

[health]
probe_interval_s = 0.2
canary_interval_s = 0

[models.tiny]
engine = "simulated"
source = "tiny"
attention_heads = 64
"""
"""Twelve recorded GPUs and the simulated engine: everything else is real."""


@pytest.fixture(scope="session")
def image() -> Image:
    if reason := missing_tools():
        pytest.skip(reason)
    return build()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as a user has it, without this machine's virtual environment and caches."""
    copy = tmp_path_factory.mktemp("systemd") / "l40sd"
    copy_source(copy)
    return copy


@pytest.fixture(scope="session")
def bare(image: Image, source: Path) -> Iterator[Container]:
    """A host on which nothing is installed yet; for the tests of install and uninstall, in their order."""
    with Container(image, {"/src": source, "/wheels": image.wheels}) as host:
        yield host


@pytest.fixture(scope="session")
def host(image: Image, source: Path) -> Iterator[Container]:
    """A host on which l40sd is installed and configured, not started."""
    with Container(image, {"/src": source, "/wheels": image.wheels}) as host:
        host.write("/etc/l40sd/l40sd.toml", CONFIG)
        host.run("/src/scripts/install --wheels /wheels", timeout_s=180)
        yield host


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a measurement that is worth a line in the test run's own output."""

    def print_now(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}")  # noqa: T201 - the reader of the run is its user

    return print_now
