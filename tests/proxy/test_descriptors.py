"""How file descriptors are shared out."""

from hypothesis import given
from hypothesis import strategies as st

from l40sd.proxy.descriptors import RESERVED, needed, share


@given(st.integers(32, 1 << 20), st.integers(1, 1_000_000))
def test_all_shares_and_the_reserve_are_there(descriptors: int, connection_limit: int) -> None:
    """With ``ulimit -n 1024`` clients alone could take 928, and the connections to workers as many again."""
    shares = share(descriptors, connection_limit)
    taken = shares.clients + shares.refused + shares.upstreams + shares.backlog
    assert taken + min(RESERVED, descriptors // 2) <= descriptors
    assert min(shares.clients, shares.refused, shares.upstreams, shares.backlog) >= 1
    assert shares.clients <= connection_limit


@given(st.integers(1, 1_000_000))
def test_what_is_needed_is_enough(connection_limit: int) -> None:
    assert share(needed(connection_limit), connection_limit).clients == connection_limit
