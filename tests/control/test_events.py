"""What happened is remembered from one daemon to the next, and numbered through."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from l40sd.codec import encode
from l40sd.control.event_file import EventFile
from l40sd.control.events import Events, Wanted
from l40sd.control.messages import Event

ALL = Wanted()


def started(path: Path, kept: int = 10, before: int = 0) -> Events:
    """A daemon's events: some happen before it may look at the file."""
    events = Events(kept)
    for number in range(before):
        events.add("info", f"early.{number}", {})
    file = EventFile(path, kept, lambda: None)
    events.resume(*file.read(), file)
    return events


@settings(deadline=None, max_examples=examples(30))
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=6), st.integers(1, 12))
def test_numbers_go_on_from_one_daemon_to_the_next(lives: list[tuple[int, int]], kept: int) -> None:
    """`events -f` of the day before showed nothing: the next daemon began at 1 again."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "events.ndjson"
        total = 0
        for early, late in lives:
            events = started(path, kept, early)
            for number in range(late):
                events.add("info", f"late.{number}", {"worker": "m-gpu0"})
            total += early + late
            assert [event.seq for event in events.last(ALL)] == list(range(max(0, total - kept) + 1, total + 1))
            events.close()
            assert not path.exists() or len(path.read_bytes().splitlines()) <= 2 * kept


def test_half_a_line_of_a_daemon_that_was_killed_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    first = Event(seq=7, time="2026-11-23T21:04:43+00:00", level="info", event="a.b")
    path.write_bytes(encode(first) + b'\n{"seq": 8, "ti\xff')
    events = started(path)
    events.add("info", "c.d", {})
    events.close()
    assert [(event.seq, event.event) for event in started(path).last(ALL)] == [(7, "a.b"), (8, "c.d")]


def test_a_place_that_cannot_be_written_costs_the_memory_and_nothing_else(tmp_path: Path) -> None:
    events = started(tmp_path / "none" / "events.ndjson")
    events.add("info", "a.b", {})
    assert [event.event for event in events.last(ALL)] == ["a.b"]
    events.close()
    events.add("info", "c.d", {})


def test_a_number_of_a_life_whose_events_are_lost_hides_nothing() -> None:
    events = Events(10)
    events.add("info", "a.b", {})
    assert [event.seq for event in events.since(4711)] == [1]
    assert events.since(1) == []


def test_only_what_is_asked_for() -> None:
    events = Events(10)
    for worker in ("m-gpu0", "m-gpu1", "m-gpu0"):
        events.add("info", "worker.ready", {"worker": worker})
    events.add("info", "config.reloaded", {})
    assert [event.seq for event in events.last(Wanted(worker="m-gpu0"))] == [1, 3]
    assert [event.seq for event in events.last(Wanted(worker="m-gpu0"), 1)] == [3]
    assert [event.seq for event in events.last(ALL, 0)] == []
    assert [event.seq for event in events.last(Wanted(since=2))] == [3, 4]
    assert [event.seq for event in events.last(Wanted(after=datetime(2020, 1, 1, tzinfo=UTC)))] == [1, 2, 3, 4]
    assert events.last(Wanted(after=datetime(2120, 1, 1, tzinfo=UTC))) == []


async def test_a_follower_gets_the_last_ones_and_then_what_happens_to_his_worker() -> None:
    events = Events(10)
    for worker in ("m-gpu0", "m-gpu1", "m-gpu0"):
        events.add("info", "worker.ready", {"worker": worker})
    followed = events.follow(Wanted(worker="m-gpu0"), 1)
    async with asyncio.timeout(10):
        assert (await anext(followed)).seq == 3
        waiting = asyncio.ensure_future(anext(followed))
        await asyncio.sleep(0)
        events.add("info", "worker.ready", {"worker": "m-gpu1"})
        await asyncio.sleep(0)
        events.add("info", "worker.ready", {"worker": "m-gpu0"})
        assert (await waiting).seq == 5


def test_access_lines_and_failed_requests_push_nothing_else_out() -> None:
    """With the access log on, a busy minute of it was all that `l40sctl events` could show."""
    events = Events(10, 5)
    for number in range(5):
        events.add("info", "worker.ready", {"number": number})
        for _ in range(100):
            events.add("info", "proxy.request", {})
        events.add("warning", "proxy.request_failed", {})
    kept = events.last(ALL)
    assert [event.data["number"] for event in kept if event.event == "worker.ready"] == list(range(5))
    assert [event.event for event in kept].count("proxy.request") == 5
    assert [event.event for event in kept].count("proxy.request_failed") == 5
    assert [event.seq for event in kept] == sorted(event.seq for event in kept)
    assert [event.seq for event in events.last(Wanted(since=kept[-3].seq))] == [event.seq for event in kept[-2:]]


def test_requests_before_the_file_may_be_read_are_kept_and_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    first = started(path)
    first.add("info", "worker.ready", {})
    first.close()
    events = Events(10)
    events.add("warning", "proxy.request_failed", {})
    events.add("info", "daemon.starting", {})
    file = EventFile(path, 10, lambda: None)
    events.resume(*file.read(), file)
    events.add("warning", "proxy.request_failed", {})
    assert [(e.seq, e.event) for e in events.last(ALL)] == [
        (1, "worker.ready"),
        (2, "proxy.request_failed"),
        (3, "daemon.starting"),
        (4, "proxy.request_failed"),
    ]
    events.close()
    assert [(e.seq, e.event) for e in started(path).last(ALL)] == [(1, "worker.ready"), (3, "daemon.starting")]


def test_no_number_is_given_twice_though_requests_are_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "events.ndjson"
    given: list[int] = []
    for _ in range(3):
        events = started(path, 5)
        for event in ("worker.ready", *["proxy.request"] * 1500, "worker.exited", "proxy.request"):
            events.add("info", event, {})
            given.append(events.last(ALL)[-1].seq)
        events.close()
    assert given == sorted(set(given))
    remembered = [event.event for event in started(path, 5).last(ALL)]
    assert remembered == ["worker.exited", *["worker.ready", "worker.exited"] * 2]
