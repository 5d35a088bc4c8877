import asyncio

import pytest
from examples import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from l40sd.model import ModelName, WorkerId
from l40sd.routing.routes import Backend, CatalogEntry, FailureKind, Lease, Routes, Waiter

CHAT = ModelName("chat")
EMBED = ModelName("embed")


def backend(worker: str, *, model: ModelName = CHAT, port: int = 1, weight: int = 1) -> Backend:
    return Backend(worker=WorkerId(worker), model=model, host="127.0.0.1", port=port, weight=weight)


def taken(routes: Routes, model: ModelName = CHAT) -> Lease:
    lease = routes.take(model)
    assert lease is not None
    return lease


def test_only_added_workers_receive_requests_and_removed_ones_keep_what_they_have() -> None:
    routes = Routes()
    routes.add(backend("a"))
    first = taken(routes)
    routes.remove(WorkerId("a"))
    assert routes.take(CHAT) is None
    assert routes.in_flight(WorkerId("a")) == 1
    first.release()
    assert routes.in_flight(WorkerId("a")) == 0


def test_a_lease_counts_once_however_often_it_is_released() -> None:
    routes = Routes()
    routes.add(backend("a"))
    one, _other = taken(routes), taken(routes)
    one.release()
    one.release()
    assert routes.in_flight(WorkerId("a")) == 1


def test_names_and_aliases_lead_to_the_model_and_a_name_wins_over_an_alias() -> None:
    routes = Routes()
    routes.set_catalog({CHAT: CatalogEntry(aliases=("gpt", "embed")), EMBED: CatalogEntry()})
    assert routes.resolve("chat") == routes.resolve("gpt") == CHAT
    assert routes.resolve("embed") == EMBED
    assert routes.resolve("other") is None
    routes.set_catalog({EMBED: CatalogEntry()})
    assert routes.resolve("chat") is None


def test_a_backend_makes_its_model_known_without_a_catalog() -> None:
    routes = Routes()
    routes.add(backend("a"))
    assert routes.resolve("chat") == CHAT
    routes.remove(WorkerId("a"))
    assert routes.resolve("chat") is None


def test_an_end_is_excused_once_and_only_by_a_worker_that_has_left_the_routes() -> None:
    routes = Routes()
    routes.add(backend("a"))
    earlier = taken(routes).route
    routes.excuse(WorkerId("b"), earlier, earlier.serial, 10.0)
    assert routes.take_excuse(WorkerId("b"), 0.0) == "", "a is still there: it had only closed a connection"
    routes.remove(WorkerId("a"))
    routes.excuse(WorkerId("b"), earlier, earlier.serial, 10.0)
    assert routes.take_excuse(WorkerId("c"), 0.0) == ""
    assert routes.take_excuse(WorkerId("b"), 0.0) == "a"
    assert routes.take_excuse(WorkerId("b"), 0.0) == ""
    routes.excuse(WorkerId("b"), earlier, earlier.serial, 10.0)
    assert routes.take_excuse(WorkerId("b"), 11.0) == "", "it was about an end before this one"


def test_wide_replicas_get_more() -> None:
    routes = Routes()
    routes.add(backend("narrow", weight=1))
    routes.add(backend("wide", weight=4))
    for _ in range(10):
        taken(routes)
    assert (routes.in_flight(WorkerId("narrow")), routes.in_flight(WorkerId("wide"))) == (2, 8)


def test_a_new_instance_does_not_inherit_the_old_ones_load() -> None:
    routes = Routes()
    routes.add(backend("a", port=1))
    old = taken(routes)
    routes.remove(WorkerId("a"))
    routes.add(backend("a", port=2))
    new = taken(routes)
    assert (new.route.backend.port, new.route.in_flight) == (2, 1)
    assert routes.in_flight(WorkerId("a")) == 2
    old.release()
    assert new.route.in_flight == 1


def test_a_drain_taken_back_keeps_counting_the_requests_that_are_still_there() -> None:
    routes = Routes()
    routes.add(backend("a"))
    first = taken(routes)
    routes.remove(WorkerId("a"))
    routes.add(backend("a"))
    assert taken(routes).route.in_flight == 2
    first.release()
    assert routes.in_flight(WorkerId("a")) == 1


class Turns(list[Lease | None]):
    def wait(
        self, routes: Routes, *, deadline_s: float = 10.0, tried: tuple[int, ...] = (), model: ModelName = CHAT
    ) -> Waiter:
        waiter = routes.wait(model, self.append, deadline_s=deadline_s, tried=tried)
        assert waiter is not None
        return waiter


def test_the_line_is_first_in_first_out_and_wakes_when_a_lease_frees() -> None:
    routes = Routes(in_flight_limit=1)
    routes.add(backend("a"))
    held = taken(routes)
    first, second = Turns(), Turns()
    first.wait(routes)
    second.wait(routes)
    held.release()
    assert (len(first), len(second)) == (1, 0)
    assert routes.take(CHAT) is None
    assert first[0] is not None
    first[0].release()
    assert len(second) == 1
    assert routes.waiting(CHAT) == 0


def test_the_line_wakes_when_a_worker_appears_or_the_limit_grows() -> None:
    routes = Routes(in_flight_limit=1)
    routes.set_catalog({CHAT: CatalogEntry()})
    turns = Turns()
    turns.wait(routes)
    turns.wait(routes)
    routes.add(backend("a"))
    assert len(turns) == 1
    routes.configure(queue_limit=10, in_flight_limit=2)
    assert len(turns) == 2


def test_one_who_cannot_take_what_is_free_does_not_hold_up_those_behind() -> None:
    routes = Routes(in_flight_limit=1)
    routes.add(backend("a"))
    held = taken(routes)
    picky, plain = Turns(), Turns()
    picky.wait(routes, tried=(held.route.serial,))
    plain.wait(routes)
    held.release()
    assert (len(picky), len(plain)) == (0, 1)


def test_a_request_may_try_a_worker_again_once_it_was_away() -> None:
    routes = Routes()
    routes.set_catalog({CHAT: CatalogEntry()})
    routes.add(backend("a"))
    lease = taken(routes)
    tried = (lease.route.serial,)
    lease.release()
    turns = Turns()
    turns.wait(routes, tried=tried)
    routes.remove(WorkerId("a"))
    routes.add(backend("a"))
    assert len(turns) == 1


def test_the_line_is_bounded_and_time_limited() -> None:
    routes = Routes(queue_limit=2)
    routes.set_catalog({CHAT: CatalogEntry()})
    early, late = Turns(), Turns()
    early.wait(routes, deadline_s=5.0)
    late.wait(routes, deadline_s=6.0)
    assert routes.wait(CHAT, early.append, deadline_s=9.0) is None
    routes.expire(4.9)
    assert (early, late) == ([], [])
    routes.expire(5.0)
    assert (early, late) == ([None], [])
    assert routes.waiting(CHAT) == 1


def test_who_left_the_line_gets_no_turn() -> None:
    routes = Routes()
    routes.set_catalog({CHAT: CatalogEntry()})
    turns = Turns()
    waiter = turns.wait(routes)
    waiter.cancel()
    waiter.cancel()
    routes.add(backend("a"))
    routes.expire(1e9)
    assert turns == []
    assert routes.in_flight(WorkerId("a")) == 0


def test_waiting_for_a_model_that_is_no_longer_served_ends_at_once() -> None:
    routes = Routes()
    routes.set_catalog({CHAT: CatalogEntry()})
    turns = Turns()
    turns.wait(routes)
    routes.set_catalog({})
    assert turns == [None]


def test_failures_reach_the_owner_of_a_routed_worker_only_and_good_answers_clear_the_row() -> None:
    routes = Routes()
    told: list[tuple[str, FailureKind]] = []
    routes.on_failure = lambda worker, kind: told.append((worker, kind))
    routes.add(backend("a"))
    lease = taken(routes)
    lease.failed(FailureKind.STATUS)
    lease.failed(FailureKind.CUT)
    assert told == [("a", FailureKind.STATUS), ("a", FailureKind.CUT)]
    assert routes.failures_in_row(WorkerId("a")) == 2
    lease.answered()
    assert routes.failures_in_row(WorkerId("a")) == 0
    routes.remove(WorkerId("a"))
    lease.failed(FailureKind.CUT)
    assert len(told) == 2
    tally = routes.tally(WorkerId("a"))
    assert (tally.served, tally.failed) == (1, 3)


async def test_drained_returns_when_the_last_lease_of_every_instance_is_back() -> None:
    routes = Routes()
    worker = WorkerId("a")
    await routes.drained(worker)  # nobody there: at once
    routes.add(backend("a", port=1))
    old = taken(routes)
    routes.add(backend("a", port=2))
    new = taken(routes)
    routes.remove(worker)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        waits = [group.create_task(routes.drained(worker)) for _ in range(3)]
        await asyncio.sleep(0)
        waits[0].cancel()
        new.release()
        await asyncio.sleep(0)
        assert not waits[1].done()
        old.release()
    assert [wait.cancelled() for wait in waits] == [True, False, False]


async def test_drained_has_no_deadline_of_its_own() -> None:
    routes = Routes()
    routes.add(backend("a"))
    taken(routes)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await routes.drained(WorkerId("a"))


class AnyOrder(RuleBasedStateMachine):
    """Any order of adding, removing, asking, waiting and releasing."""

    def __init__(self) -> None:
        super().__init__()
        self.routes = Routes(queue_limit=5, in_flight_limit=2)
        self.routes.set_catalog({CHAT: CatalogEntry()})
        self.open: dict[str, int] = {}
        self.leases: list[Lease] = []
        self.waiters: list[Waiter] = []
        self.turns: list[int] = []
        self.asked = 0

    @rule(name=st.sampled_from("abc"), port=st.integers(1, 2))
    def add(self, name: str, port: int) -> None:
        self.open[name] = port
        self.routes.add(backend(name, port=port))

    @rule(name=st.sampled_from("abc"))
    def remove(self, name: str) -> None:
        self.open.pop(name, None)
        self.routes.remove(WorkerId(name))

    @rule()
    def ask(self) -> None:
        lease = self.routes.take(CHAT)
        if lease is not None:
            assert self.open[lease.route.backend.worker] == lease.route.backend.port
            self.leases.append(lease)
            return
        self.asked += 1
        number = self.asked

        def on_turn(lease: Lease | None) -> None:
            assert lease is not None
            self.turns.append(number)
            self.leases.append(lease)

        waiter = self.routes.wait(CHAT, on_turn, deadline_s=1.0)
        if waiter is not None:
            self.waiters.append(waiter)

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.waiters.pop(data.draw(st.integers(0, len(self.waiters) - 1))).cancel()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        lease.release()

    @invariant()
    def every_lease_counts_once(self) -> None:
        for name in "abc":
            held = sum(lease.route.backend.worker == name for lease in self.leases)
            assert self.routes.in_flight(WorkerId(name)) == held

    @invariant()
    def turns_come_in_order_and_nobody_waits_beside_a_free_worker(self) -> None:
        assert self.turns == sorted(self.turns)
        if self.routes.waiting(CHAT):
            assert self.routes.take(CHAT) is None

    def teardown(self) -> None:
        for waiter in self.waiters:
            waiter.cancel()
        for lease in self.leases:
            lease.release()
        assert all(self.routes.in_flight(WorkerId(name)) == 0 for name in "abc")


AnyOrder.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_worker_whose_share_grows_gets_what_its_share_is() -> None:
    routes = Routes()
    routes.add(backend("well"))
    routes.add(backend("back"))
    routes.weigh(WorkerId("back"), share=0.25, is_failing=False)
    for _ in range(10):
        taken(routes)
    assert (routes.in_flight(WorkerId("well")), routes.in_flight(WorkerId("back"))) == (8, 2)
    routes.weigh(WorkerId("back"), share=1.0, is_failing=False)
    for _ in range(6):
        taken(routes)
    assert (routes.in_flight(WorkerId("well")), routes.in_flight(WorkerId("back"))) == (8, 8)


@pytest.mark.parametrize(("weight", "expected"), [(1, 30), (2, 20)])
def test_a_worker_that_fails_at_once_and_is_kept_gets_no_more_than_its_share(weight: int, expected: int) -> None:
    """Of three workers two failed: one was out, and the other, always the least busy, took nearly all requests."""
    routes = Routes()
    routes.add(backend("well", weight=weight))
    routes.add(backend("failing"))
    routes.weigh(WorkerId("failing"), share=1.0, is_failing=True)
    on_failing = 0
    for _ in range(60):
        lease = taken(routes)
        if lease.route.backend.worker == "failing":
            lease.release()  # it answers at once; the other one's requests go on
            on_failing += 1
    assert on_failing == expected
    routes.weigh(WorkerId("failing"), share=1.0, is_failing=False)
    assert taken(routes).route.backend.worker == "failing", "the least busy one again"


def test_a_reply_that_broke_off_was_no_good_one() -> None:
    routes = Routes()
    routes.add(backend("a"))
    for kind in (FailureKind.CUT, FailureKind.IDLE):
        lease = taken(routes)
        lease.answered()
        lease.failed(kind)
    taken(routes).failed(FailureKind.STATUS)
    assert (routes.counts(WorkerId("a")).good, routes.counts(WorkerId("a")).failed) == (0, 3)
