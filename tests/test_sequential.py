"""Sequential reads: what is made ready ahead, and what is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagofs.sequential import SequentialReads


def read(reads: SequentialReads, first: int, count: int = 1, *, missed: bool = False) -> set[int]:
    return set(reads.touch(first, count, missed=missed) or ())


def test_the_second_read_in_a_row_begins_a_stream_that_grows() -> None:
    reads = SequentialReads(32, 1000)
    assert read(reads, 10) == set()
    ready = read(reads, 11)
    assert ready == {12, 13}
    sizes = []
    for cluster in range(12, 200):
        assert cluster in ready, "the reader never waits from now on"
        more = read(reads, cluster)
        assert not more & ready, "nothing is made ready twice"
        ready |= more
        sizes.append(max(ready) - cluster)
    assert max(sizes) == 32
    assert min(sizes[50:]) >= 16
    assert sizes[0] == 4, "it grows from little"


def test_long_reads_in_a_row() -> None:
    reads = SequentialReads(32, 1000)
    assert read(reads, 0, 16) == set()
    assert read(reads, 16, 16) == set(range(32, 64))
    assert read(reads, 32, 16) == set(range(64, 80))


def test_random_reads_make_nothing_ready() -> None:
    reads = SequentialReads(32, 1000)
    assert not any(read(reads, number * 7919 % 10_007) for number in range(3000))


def test_out_of_order_within_the_window() -> None:
    reads = SequentialReads(32, 1000)
    ready = read(reads, 0) | read(reads, 1)
    for first in range(2, 400, 4):
        for cluster in (first + 1, first, first + 3, first + 2):
            ready |= read(reads, cluster)
    assert ready >= set(range(2, 400))
    assert max(ready) < 402 + 32


def test_several_streams_share_what_there_is() -> None:
    reads = SequentialReads(32, 64)
    starts = range(0, 16_000, 1000)
    ahead = dict.fromkeys(starts, 0)
    for step in range(100):
        for start in starts:
            ready = read(reads, start + step)
            if ready:
                ahead[start] = max(ready) - start - step
    assert all(0 < distance <= 64 // 16 for distance in ahead.values())


def test_streams_that_ended_take_no_share() -> None:
    reads = SequentialReads(32, 64)
    for turn in range(20):  # one reader after the other, each of the same disk
        for cluster in range(100):
            ready = read(reads, cluster)
            if ready and turn and cluster > 60:
                assert max(ready) - cluster == 32


def test_what_was_displaced_is_made_ready_anew() -> None:
    reads = SequentialReads(32, 1000)
    for cluster in range(40):
        read(reads, cluster)
    again = read(reads, 40, missed=True)
    assert again
    assert min(again) == 41
    assert len(again) < 32, "it is more careful now"


@given(
    st.integers(1, 64),
    st.integers(0, 256),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20), st.booleans()), max_size=200),
)
def test_bounds(most: int, together: int, touches: list[tuple[int, int, bool]]) -> None:
    reads = SequentialReads(most, together)
    for first, count, missed in touches:
        ready = reads.touch(first, count, missed=missed)
        if ready is not None:
            assert 0 < len(ready) <= most
            assert ready.start >= first + count or not missed
