"""What a run says is shown with its test, whether it passes or not."""

from collections.abc import Callable

import pytest


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print past pytest's capture: seeds and counts belong in CI's log."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(text)  # noqa: T201

    return show
