"""Range locks: exclusion, order, fairness, and what cancellation leaves behind."""

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from imagofs.errors import OutOfRangeError
from imagofs.storage.blockers import RangeHold, RangeLocks, WriteBlockers


class Tracker:
    """Tasks that hold ranges until they are told to leave, and who got in when."""

    def __init__(self, nursery):
        self.nursery = nursery
        self.entered: list[str] = []
        self.leave: dict[str, trio.Event] = {}
        self.scopes: dict[str, trio.CancelScope] = {}

    async def start(self, name: str, hold: RangeHold) -> None:
        self.leave[name] = trio.Event()
        self.scopes[name] = trio.CancelScope()

        async def task():
            with self.scopes[name]:
                async with hold:
                    self.entered.append(name)
                    await self.leave[name].wait()

        self.nursery.start_soon(task)
        await wait_all_tasks_blocked()

    async def end(self, name: str) -> None:
        self.leave[name].set()
        await wait_all_tasks_blocked()

    async def cancel(self, name: str) -> None:
        self.scopes[name].cancel()
        await wait_all_tasks_blocked()


async def test_overlapping_waits_disjoint_and_adjacent_do_not(nursery):
    locks = RangeLocks()
    tasks = Tracker(nursery)
    await tasks.start("a", locks.hold(100, 200))
    await tasks.start("left", locks.hold(50, 100))
    await tasks.start("right", locks.hold(200, 300))
    await tasks.start("over", locks.hold(199, 201))
    assert tasks.entered == ["a", "left", "right"]
    await tasks.end("a")
    assert "over" not in tasks.entered  # `right` still has byte 200
    await tasks.end("right")
    assert tasks.entered[-1] == "over"
    await tasks.end("left")
    await tasks.end("over")
    assert not locks.entries


async def test_order_of_requests_is_kept_and_nobody_starves(nursery):
    locks = RangeLocks()
    tasks = Tracker(nursery)
    await tasks.start("first", locks.hold(0, 10))
    await tasks.start("wide", locks.hold(0, 100))
    # Free at this moment, but it would keep `wide` waiting: it comes after it.
    await tasks.start("late", locks.hold(50, 60))
    assert tasks.entered == ["first"]
    await tasks.end("first")
    assert tasks.entered == ["first", "wide"]
    await tasks.end("wide")
    assert tasks.entered == ["first", "wide", "late"]
    await tasks.end("late")


async def test_weak_overlaps_weak_strong_excludes(nursery):
    blockers = WriteBlockers()
    tasks = Tracker(nursery)
    await tasks.start("weak1", blockers.weak(0, 100))
    await tasks.start("weak2", blockers.weak(50, 150))
    await tasks.start("strong1", blockers.strong(90, 95))
    await tasks.start("weak3", blockers.weak(94, 200))
    await tasks.start("strong2", blockers.strong(300, 400))
    assert tasks.entered == ["weak1", "weak2", "strong2"]
    await tasks.end("weak1")
    assert "strong1" not in tasks.entered
    await tasks.end("weak2")
    assert tasks.entered[-1] == "strong1"
    await tasks.end("strong1")
    assert tasks.entered[-1] == "weak3"
    for name in ("weak3", "strong2"):
        await tasks.end(name)
    assert not blockers.locks.entries


async def test_cancelled_waiter_frees_those_behind_it(nursery):
    locks = RangeLocks()
    tasks = Tracker(nursery)
    await tasks.start("a", locks.hold(0, 10))
    await tasks.start("b", locks.hold(5, 25))
    await tasks.start("c", locks.hold(20, 30))
    assert tasks.entered == ["a"]
    await tasks.cancel("b")
    assert tasks.entered == ["a", "c"]
    assert locks.is_free(10, 20)
    await tasks.cancel("a")
    await tasks.cancel("c")
    assert not locks.entries


async def test_cancelled_holder_leaves_nothing(nursery):
    locks = RangeLocks()
    tasks = Tracker(nursery)
    await tasks.start("a", locks.hold(0, 10))
    await tasks.start("b", locks.hold(0, 10))
    await tasks.cancel("a")
    assert tasks.entered == ["a", "b"]
    await tasks.end("b")
    assert not locks.entries


async def test_grant_and_cancel_in_the_same_tick(nursery):
    locks = RangeLocks()
    tasks = Tracker(nursery)
    await tasks.start("a", locks.hold(0, 10))
    await tasks.start("b", locks.hold(0, 10))
    await tasks.start("c", locks.hold(0, 10))
    tasks.leave["a"].set()
    tasks.scopes["b"].cancel()
    await wait_all_tasks_blocked()
    assert tasks.entered[-1] == "c"
    await tasks.end("c")
    assert not locks.entries


async def test_is_free_and_enter_nowait():
    locks = RangeLocks()
    assert locks.is_free(0, 1 << 60)
    async with locks.hold(100, 200):
        assert locks.is_free(0, 100) and locks.is_free(200, 201)
        assert not locks.is_free(99, 101) and not locks.is_free(150, 160)
        assert locks.is_free(150, 150)
        assert not locks.hold(199, 300).enter_nowait()
        other = locks.hold(200, 300)
        assert other.enter_nowait()
        assert not locks.is_free(250, 251)
        other.release()
        assert locks.is_free(250, 251)
    assert locks.is_free(100, 200)


async def test_empty_range_conflicts_with_nothing():
    locks = RangeLocks()
    async with locks.hold(0, 10), locks.hold(5, 5):
        assert len(locks.entries) == 1
    assert not locks.entries


async def test_entering_one_hold_twice_is_refused():
    locks = RangeLocks()
    hold = locks.hold(0, 10)
    async with hold:
        with pytest.raises(RuntimeError):
            async with hold:
                pass
    async with hold:
        pass
    assert not locks.entries


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (-5, -1)])
def test_impossible_ranges_are_refused(start, end):
    with pytest.raises(OutOfRangeError):
        RangeLocks().hold(start, end)


async def test_release_after_an_error_inside():
    locks = RangeLocks()
    with pytest.raises(KeyError):
        async with locks.hold(0, 10):
            raise KeyError
    assert not locks.entries


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 15), st.integers(1, 6), st.booleans(), st.integers(0, 5), st.booleans()
        ),
        min_size=1,
        max_size=12,
    ),
)
async def test_no_two_conflicting_holders_ever(requests):
    """Random tasks, some cancelled: exclusion holds, all end, and nothing stays behind."""
    blockers = WriteBlockers()
    holders: list[tuple[int, int, bool]] = []

    async def task(start, length, strong, ticks, cancel):
        with trio.CancelScope() as scope:
            if cancel:
                scope.cancel()
            hold = (blockers.strong if strong else blockers.weak)(start, start + length)
            async with hold:
                me = (start, start + length, strong)
                for low, high, other_strong in holders:
                    assert high <= start or start + length <= low or not (strong or other_strong)
                holders.append(me)
                try:
                    for _ in range(ticks):
                        await trio.lowlevel.checkpoint()
                finally:
                    holders.remove(me)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(task, *request)
    assert not blockers.locks.entries
