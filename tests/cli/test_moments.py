"""Moments at the command line."""

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.cli.moments import parse_moment

NOW = datetime(2026, 11, 23, 3, 7, 9, 500, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", "2026-11-23T03:05:39.000500+01:00"),
        ("10 min", "2026-11-23T02:57:09.000500+01:00"),
        ("1h 30m", "2026-11-23T01:37:09.000500+01:00"),
        ("2d", "2026-11-21T03:07:09.000500+01:00"),
        ("3:05", "2026-11-23T03:05:00+01:00"),
        ("21:04:43", "2026-11-22T21:04:43+01:00"),
        ("2026-11-20", "2026-11-20T00:00:00+01:00"),
        ("2026-11-20 21:04", "2026-11-20T21:04:00+01:00"),
        ("2026-11-20T21:04:00+00:00", "2026-11-20T21:04:00+00:00"),
    ],
)
def test_a_moment_is_what_people_mean_by_it(text: str, moment: str) -> None:
    assert parse_moment(text, NOW).isoformat() == moment


@given(st.text(max_size=20) | st.from_regex(r"[0-9]{1,12} ?[smhd:-]{1,3}([0-9]{0,4})", fullmatch=True))
def test_what_is_none_is_refused_in_so_many_words(text: str) -> None:
    try:
        moment = parse_moment(text, NOW)
    except ValueError as error:
        refusal = str(error)
    else:
        assert moment.tzinfo is not None
        return
    assert "is no time" in refusal or "is too long ago" in refusal
