"""An event as a person reads it."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from l40sd.event_line import told

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def test_what_happened_to_whom_and_why_comes_first_and_what_is_long_last() -> None:
    """In `events` the reason stood behind twelve lines of the engine's output."""
    data = {
        "gpus": [0, 1],
        "last_lines": ["a b", "c"],
        "code": None,
        "worker": "m-gpu0",
        "reason": "no\n  hint: x",
        "n": 1,
    }
    assert told("worker.failed", data) == (
        "worker.failed m-gpu0",
        "no; hint: x",
        [("gpus", "0,1"), ("n", "1"), ("last_lines", "a b; c")],
    )
    assert told("config.reloaded", {"changed": []}) == ("config.reloaded", "", [("changed", "")])


@given(st.dictionaries(st.sampled_from(["worker", "reason", "why", "last_lines", "x"]), JSON))
def test_it_is_one_line_that_drives_no_terminal(data: dict[str, Any]) -> None:
    subject, reason, rest = told("a.b", data)
    assert all(text.isprintable() for text in (subject, reason, *(value for _, value in rest)))
    assert {key for key, _ in rest} <= {key for key, value in data.items() if value is not None}
