"""The thread that does one thing at a time for another, which may take it back."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator

import pytest

from imagofs.fuse.second_thread import SecondThread


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondThread]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    second = SecondThread()
    yield second
    second.close()


def is_busy(second: SecondThread) -> bool:
    """For the type checker, who thinks that nothing changes it in between."""
    return second.is_busy


def asleep(second: SecondThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it find no processor from now on."""
    monkeypatch.setattr(SecondThread, "_wake_up", lambda _: None)


def test_another_thread_does_it(second: SecondThread) -> None:
    done = threading.Event()
    by: list[int] = []

    def work() -> None:
        by.append(threading.get_ident())
        done.set()

    for _ in range(3):
        done.clear()
        assert second.give(work)
        assert done.wait(10)
        second.settle()
        assert not is_busy(second)
    assert len(set(by)) == 1
    assert by[0] != threading.get_ident()


def test_one_at_a_time(second: SecondThread) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work() -> None:
        begun.set()
        assert go_on.wait(10)
        done.append(1)

    assert second.give(work)
    assert begun.wait(10)
    assert is_busy(second)
    assert not second.give(lambda: done.append(2))
    assert not second.take_back()
    threading.Timer(0.05, go_on.set).start()
    second.settle()
    assert done == [1]
    assert not is_busy(second)
    assert second.give(lambda: done.append(3))
    second.settle()
    assert done == [1, 3]


@pytest.mark.parametrize("how", ["take_back", "settle", "close"])
def test_it_is_taken_back(second: SecondThread, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by: list[int] = []
    assert second.give(lambda: None)
    second.settle()
    with monkeypatch.context() as patched:
        asleep(second, patched)
        assert second.give(lambda: by.append(threading.get_ident()))
        assert is_busy(second)
        if how != "close":
            getattr(second, how)()
            assert by == [threading.get_ident()]
            assert not is_busy(second)
            assert not second.take_back()
    second.close()
    assert by == [threading.get_ident()]


def test_each_is_done_once_and_in_turn(second: SecondThread) -> None:
    order = random.Random(8)
    done: list[int] = []
    expected: list[int] = []
    for number in range(20_000):
        if second.give(lambda number=number: done.append(number)):  # type: ignore[misc]
            expected.append(number)
        match order.randrange(4):
            case 0:
                second.take_back()
            case 1:
                second.settle()
                assert done == expected
    second.settle()
    assert done == expected
    assert len(expected) > 10_000


def test_close_ends_the_thread(second: SecondThread) -> None:
    before = threading.active_count()
    assert second.give(lambda: None)
    assert threading.active_count() == before + 1
    second.close()
    assert threading.active_count() == before
    assert not second.give(lambda: None)
    second.close()


def test_no_thread_before_there_is_work(second: SecondThread) -> None:
    before = threading.active_count()
    second.take_back()
    second.settle()
    second.close()
    assert threading.active_count() == before


def test_the_system_has_no_thread_left(
    second: SecondThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert not second.give(lambda: None)
    assert not second.give(lambda: None), "it asks once"
    assert not is_busy(second)
    second.settle()


def test_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    second = SecondThread()
    assert not second.give(lambda: None)
    assert not is_busy(second)
    second.close()
