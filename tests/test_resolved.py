"""The resolved map against a plain model: each granule looked up by itself, neighbours merged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.caching import MetadataCache
from imagofs.format import base
from imagofs.resolved import CHUNK_GRANULES, SPECIAL, ZERO, NotCached, ResolvedMap, Run

GRANULE = 4096


def resolved_map(answers: dict[int, int]) -> ResolvedMap:
    """The map of one layer with three storages, which has nothing where `answers` says nothing."""
    layer: Any = SimpleNamespace(
        granularity=GRANULE,
        data_storages=("a", "b", "c"),
        entry_at=lambda guest_offset: answers.get(guest_offset // GRANULE, base.INDIRECT),
        subscribe=lambda _: None,
    )
    return ResolvedMap([layer], MetadataCache())


def place(host_granule: int, storage: int, in_place: bool) -> int:
    return host_granule * GRANULE | in_place * base.IN_PLACE | storage


#: Few places, so that neighbours often continue each other.
PLACES = st.builds(place, st.integers(0, 6), st.integers(0, 2), st.booleans())
ANSWERS = st.one_of(PLACES, st.sampled_from([base.ZERO, base.SPECIAL, base.INDIRECT]))


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
        answer = answers.get(guest_offset // GRANULE, base.INDIRECT)
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


def test_what_changed_is_looked_up_anew() -> None:
    answers = {number: place(number, 0, False) for number in range(8)}
    resolved = resolved_map(answers)
    assert len(resolved.runs(0, 8 * GRANULE)) == 1
    answers[3] = base.ZERO
    assert len(resolved.runs(0, 8 * GRANULE)) == 1, "it is kept"
    resolved.forget(3 * GRANULE, 1)
    assert [run.code for run in resolved.runs(0, 8 * GRANULE)] == [0, ZERO, 0]
