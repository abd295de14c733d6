"""The resolved map against a plain model: each granule looked up by itself, neighbours merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.caching import MetadataCache
from imagofs.format import base
from imagofs.format.base import INDIRECT, FormatDriver
from imagofs.resolved import CHUNK_GRANULES, MIXED, SPECIAL, ZERO, NotCached, ResolvedMap, Run

GRANULE = 4096


class Layer:
    """What the map asks of a driver.

    Args:
        answers: By granule; INDIRECT where nothing is said.
        size: Bytes of its disk; None: very many.
        granularity: As the driver's.
        missing: Granules whose table is not in memory.
        storages: Three with data.
    """

    def __init__(
        self,
        answers: dict[int, int],
        *,
        size: int = 1 << 40,
        granularity: int = GRANULE,
        missing: Iterable[int] = (),
        storages: str = "abc",
    ) -> None:
        self.data_storages = tuple(storages)
        self.answers, self.granularity, self.missing = answers, granularity, set(missing)
        self.size = lambda: size
        self.subscribe = lambda listener: None

    def entry_at(self, guest_offset: int) -> int:
        assert guest_offset < self.size()
        number = guest_offset // GRANULE
        return base.NOT_CACHED if number in self.missing else self.answers.get(number, INDIRECT)

    entries_at: Any = FormatDriver.entries_at


def map_of(*layers: Layer) -> ResolvedMap:
    chain: Any = layers
    return ResolvedMap(chain, MetadataCache())


def resolved_map(answers: dict[int, int]) -> ResolvedMap:
    """The map of one layer with three storages, which has nothing where `answers` says nothing."""
    return map_of(Layer(answers))


def place(host_granule: int, storage: int, in_place: bool) -> int:
    return host_granule * GRANULE | in_place * base.IN_PLACE | storage


#: Few places, so that neighbours often continue each other.
PLACES = st.builds(place, st.integers(0, 6), st.integers(0, 2), st.booleans())
ANSWERS = st.one_of(PLACES, st.sampled_from([base.ZERO, base.SPECIAL, INDIRECT]))


@st.composite
def layouts(draw: st.DrawFn) -> dict[int, int]:
    """Answers around the boundary of two chunks, also such that continue each other."""
    answers: dict[int, int] = {}
    number = CHUNK_GRANULES - 8
    while number < CHUNK_GRANULES + 8:
        answer = draw(ANSWERS)
        for step in range(draw(st.integers(1, 6))):
            answers[number + step] = answer + step * GRANULE if answer >= 0 else answer
        number += step + 1
    return answers


def runs_of_model(answers: dict[int, int], guest_offset: int, length: int) -> list[Run]:
    runs: list[Run] = []
    end = guest_offset + length
    while guest_offset < end:
        step = min(end, (guest_offset // GRANULE + 1) * GRANULE) - guest_offset
        answer = answers.get(guest_offset // GRANULE, INDIRECT)
        if answer >= 0:
            code = answer & base.STORAGE_MASK
            position = (answer & base.HOST_OFFSET_MASK) + guest_offset % GRANULE
        else:
            code = SPECIAL if answer == base.SPECIAL else ZERO
            position = 0
        if runs and runs[-1].code == code:
            last = runs[-1]
            if position == last.position + (last.length if answer >= 0 else 0):
                runs[-1] = last._replace(length=last.length + step)
                guest_offset += step
                continue
        runs.append(Run(code, position, step))
        guest_offset += step
    return runs


@given(layouts(), st.data())
def test_runs(answers: dict[int, int], data: st.DataObject) -> None:
    resolved = resolved_map(answers)
    first, last = min(answers) * GRANULE, (max(answers) + 1) * GRANULE
    for _ in range(3):
        offset = data.draw(st.integers(first, last - 1))
        length = data.draw(st.integers(1, last - offset))
        runs = resolved.runs(offset, length)
        assert [run._replace(position=0) if run.code == ZERO else run for run in runs] == (
            runs_of_model(answers, offset, length)
        )
        granules = range(offset // GRANULE, (offset + length - 1) // GRANULE + 1)
        if all((answer := answers[n]) >= 0 and answer & base.IN_PLACE for n in granules):
            assert resolved.runs(offset, length, in_place=True) == runs
        else:
            assert resolved.runs(offset, length, in_place=True) == []


@given(layouts(), st.data())
def test_places(answers: dict[int, int], data: st.DataObject) -> None:
    resolved = resolved_map(answers)
    first, last = min(answers) * GRANULE, (max(answers) + 1) * GRANULE
    assert resolved.places(first, GRANULE) is None, "not looked up yet"
    resolved.runs(first, last - first)
    boundary = CHUNK_GRANULES * GRANULE
    for _ in range(3):
        offset = data.draw(st.integers(first, last - 1))
        length = data.draw(st.integers(1, last - offset))
        runs = resolved.runs(offset, length)
        known = offset // boundary == (offset + length - 1) // boundary
        known = known and all(run.code < 3 for run in runs)
        assert resolved.places(offset, length) == (runs if known else None)


def test_a_table_that_is_missing_is_asked_for_once_it_is_needed() -> None:
    answers = {0: place(5, 0, True), 1: base.NOT_CACHED}
    resolved = resolved_map(answers)
    assert resolved.runs(0, GRANULE) == [Run(0, 5 * GRANULE, GRANULE)]
    for in_place in (True, False):
        with pytest.raises(NotCached) as caught:
            resolved.runs(100, GRANULE, in_place=in_place)
        assert caught.value.guest_offset == GRANULE
    answers[1] = place(6, 0, True)
    assert resolved.runs(100, GRANULE) == [Run(0, 5 * GRANULE + 100, GRANULE)]


class Counting(Layer):
    """Counts what it is asked, and has granules that it cannot tell of."""

    broken: frozenset[int] = frozenset()
    asked = 0

    def entry_at(self, guest_offset: int) -> int:
        self.asked += 1
        if guest_offset // GRANULE in self.broken:
            raise ValueError("a broken table")
        return super().entry_at(guest_offset)


def test_whoever_comes_back_to_a_block_gets_all_of_it() -> None:
    layer = Counting({number: place(number, 0, False) for number in range(64)})
    resolved = map_of(layer)
    asked = []
    for number in (20, 16, 31, 17, 5, 40, 4, 15):
        assert resolved.runs(number * GRANULE, 1) == [Run(0, number * GRANULE, 1)]
        asked.append(layer.asked)
    assert asked == [1, 17, 17, 17, 18, 19, 35, 35]


def test_the_end_of_the_disk_is_the_end_of_its_block() -> None:
    layer = Counting({0: place(1, 0, False)}, size=5 * GRANULE - 100)
    resolved = map_of(layer)
    for number in (0, 4, 2):
        resolved.runs(number * GRANULE, 1)
    assert layer.asked == 5


def test_what_is_wrong_with_others_of_a_block_is_not_raised() -> None:
    layer = Counting({number: place(number, 0, False) for number in range(16)}, missing=[3])
    layer.broken = frozenset([9])
    resolved = map_of(layer)
    for number in (5, 12, 0, 15, 8, 1):
        assert resolved.runs(number * GRANULE, 1) == [Run(0, number * GRANULE, 1)]
    for _ in range(2):
        with pytest.raises(NotCached):
            resolved.entry(3 * GRANULE)
        with pytest.raises(ValueError, match="a broken table"):
            resolved.entry(9 * GRANULE)
    layer.missing.clear()
    assert resolved.entry(3 * GRANULE) == 3 * GRANULE


def test_what_changed_is_looked_up_anew() -> None:
    answers = {number: place(number, 0, False) for number in range(8)}
    resolved = resolved_map(answers)
    assert len(resolved.runs(0, 8 * GRANULE)) == 1
    answers[3] = base.ZERO
    assert len(resolved.runs(0, 8 * GRANULE)) == 1, "it is kept"
    resolved.forget(5 * GRANULE, 1)
    assert len(resolved.runs(0, 8 * GRANULE)) == 1, "what is beside it is looked up"
    resolved.forget(3 * GRANULE, 1)
    assert [run.code for run in resolved.runs(0, 8 * GRANULE)] == [0, ZERO, 0]


# --- a range in one walk ------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> list[Layer]:
    """Up to five layers that end around the boundary of two chunks, or far behind it."""
    edge = CHUNK_GRANULES * GRANULE
    sizes = st.integers(edge - 5 * GRANULE, edge + 5 * GRANULE) | st.just(1 << 40)
    numbers = st.integers(CHUNK_GRANULES - 8, CHUNK_GRANULES + 8)
    return [
        Layer(
            draw(layouts()) | draw(st.dictionaries(numbers, st.just(base.MIXED), max_size=2)),
            size=draw(sizes) if depth else 1 << 40,
            granularity=draw(st.sampled_from([GRANULE] * 6 + [4 * GRANULE, 0])),
            missing=draw(st.sets(numbers, max_size=4)),
            storages=draw(st.sampled_from(["abc", "cde", "efg"])),
        )
        for depth in range(draw(st.integers(1, 5)))
    ]


def entry_of_model(layers: list[Layer], storages: Sequence[object], number: int) -> int:
    for depth, layer in enumerate(layers):
        if not layer.granularity:
            return MIXED
        if depth and (number + 1) * GRANULE > layer.size():
            return ZERO if number * GRANULE >= layer.size() else MIXED
        answer = layer.answers.get(number, INDIRECT)
        if answer >= 0:
            storage = storages.index(layer.data_storages[answer & base.STORAGE_MASK])
            in_place = base.IN_PLACE if depth == 0 else 0
            return answer & (base.HOST_OFFSET_MASK | in_place) | storage
        if answer != INDIRECT:
            codes = {base.ZERO: ZERO, base.SPECIAL: depth << 9 | SPECIAL, base.MIXED: MIXED}
            return codes[answer]
    return ZERO


@given(chains(), st.data())
def test_a_range_is_what_its_granules_are(layers: list[Layer], data: st.DataObject) -> None:
    layers.append(Layer({}, size=0))  # so that the granule is known
    resolved = map_of(*layers)
    numbers = st.integers(CHUNK_GRANULES - 10, CHUNK_GRANULES + 10)
    steps = st.lists(st.tuples(st.sampled_from(["look", "forget"]), numbers, numbers), max_size=5)
    for step, first, last in data.draw(steps):
        first, last = sorted((first, last))
        offset, length = first * GRANULE, (last - first + 1) * GRANULE
        if step == "forget":
            resolved.forget(offset, length)
            continue
        runs = None
        while runs is None:
            try:
                runs = resolved.runs(offset, length)
            except NotCached as missing:
                driver: Any = missing.driver
                number = missing.guest_offset // GRANULE
                assert first <= number <= last
                for layer in layers[: layers.index(driver)]:
                    assert layer.entry_at(missing.guest_offset) == INDIRECT, "it is not needed"
                driver.missing.remove(number)
        single = map_of(*layers)
        for number in range(first, last + 1):
            want = entry_of_model(layers, resolved.storages, number)
            assert resolved.entry(number * GRANULE) == single.entry(number * GRANULE) == want
        assert runs == single.runs(offset, length)


def test_what_was_found_before_a_table_is_missed_is_kept() -> None:
    """Else a cache that holds few tables would make a range wait for ever."""
    layers = [Layer({0: base.ZERO}), Layer({1: place(3, 0, False)}, missing=[2])]
    resolved = map_of(*layers)
    with pytest.raises(NotCached):
        resolved.runs(0, 3 * GRANULE)
    for layer in layers:
        layer.answers = {}
    assert resolved.entry(0) == ZERO
    assert resolved.entry(GRANULE) == place(3, 0, False)
