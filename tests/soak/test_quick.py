"""The long runs in short, for CI."""

from collections.abc import Callable

import pytest

from soak import connections, kills, operations

pytestmark = pytest.mark.e2e

SEED = 20260


def test_random_operations_leave_everything_as_it_is_wanted(say: Callable[[str], None]) -> None:
    operations.soak(60, SEED, say)


def test_a_daemon_killed_at_random_moments_is_followed_by_one_that_knows_everybody(say: Callable[[str], None]) -> None:
    kills.soak(15, SEED, say)


def test_no_connection_is_refused_over_an_upgrade_and_a_kill(say: Callable[[str], None]) -> None:
    connections.soak(say, ways=("upgrade", "kill"))
