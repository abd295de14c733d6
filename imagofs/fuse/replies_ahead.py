"""The data of large READs, put into pipes before they are asked for.

Who reads in order in requests of 1 MiB sends two READs at a time. The kernel gathers and sends one
(`reply_ring.py`); the other is ours, and would need a look whether the page cache has it, and a
splice for each of its ranges. Between two requests there is time to have the kernel's thread gather
the next one of ours: then it takes a header, and two splices, from however many places it comes.

Two are gathered, since that thread may come to the first of them only after the next request.

What is in a pipe are pages of files, for a moment: nobody writes to the image, `forget` lets go of
them when nothing comes for a while, and none is sent that has been there for longer than `_FRESH`.

Nobody has asked for them yet, so nobody may have to wait for them: a chain that waits for a file
keeps the others waiting, too. So what is likely to be in the page cache is gathered only, and no
reply is given to the kernel behind a chain that is late.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final

from .protocol import MAX_WRITE
from .reply_pipe import open_pipe

if TYPE_CHECKING:
    from ..reading import FileRange
    from .splice_ring import Done, SpliceRing

__all__ = ["RepliesAhead"]

_PLACES = 2
#: READs at the same distance, one after the other, before another is expected there.
_IN_TURN = 4
#: What is gathered is of use for so long (seconds).
_FRESH = 0.05
#: A chain that takes longer (seconds) waits for a file, or for another that does.
_LATE = 0.0005
#: A chain of the kernel's costs the same for smaller ones, and saves less: not worth it.
_READ_BYTES: Final = MAX_WRITE
_NOTHING = -1
#: No pipe was to be had this often in turn: none is asked for any more.
_PATIENCE = 16


class _Place:
    """Room for the data of one READ.

    Attributes:
        number: Of the chain that fills it.
        offset: Of the READ; `_NOTHING` if none is expected.
        is_filling: Whether the chain is under way.
        last_length: Bytes of its last splice.
        begun: When (`monotonic`).
        ends: Of its pipe: output and input; None if there is none.
    """

    __slots__ = ("begun", "ends", "is_filling", "last_length", "number", "offset")

    def __init__(self, number: int) -> None:
        self.number = number
        self.offset = _NOTHING
        self.is_filling = False
        self.last_length = 0
        self.begun = 0.0
        self.ends: tuple[int, int] | None = None

    def empty(self) -> None:
        """Let go of what is in it, or will be."""
        self.offset = _NOTHING
        if not self.is_filling:
            self.close()

    def close(self) -> None:
        """Close the pipe."""
        if self.ends is not None:
            os.close(self.ends[0])
            os.close(self.ends[1])
            self.ends = None


class RepliesAhead:
    """Expects READs, and has their data gathered. All methods are plain functions.

    Args:
        ring: What gathers them.
        number: Its chains from this number on are ours.
    """

    def __init__(self, ring: SpliceRing, number: int) -> None:
        self._ring = ring
        self._first_number = number
        self._places = [_Place(number + index) for index in range(_PLACES)]
        self._offset = self._distance = self._in_turn = 0
        #: Whether `fill` has something to do.
        self.is_wanted = False
        self._patience = _PATIENCE

    def note(self, offset: int, size: int) -> None:
        """Take notice of a READ that is left to us, most often since the kernel sends another."""
        distance = offset - self._offset
        self._offset = offset
        if distance == self._distance and size == _READ_BYTES <= distance:
            self._in_turn += 1
            self.is_wanted = self._in_turn >= _IN_TURN
        else:
            self._distance = distance
            self._in_turn = 0
            self.forget()

    def fill(self, ranges_of: Callable[[int, int], Sequence[FileRange] | None]) -> None:
        """Have the data of the READs gathered that are expected next; let go of any others.

        Args:
            ranges_of: Says where they are, given offset and length in bytes; None: not to be had.
        """
        self.is_wanted = False
        distance = self._distance
        expected = [self._offset + distance * step for step in range(1, _PLACES + 1)]
        for place in self._places:
            if place.offset in expected:
                expected.remove(place.offset)
            elif place.offset != _NOTHING:
                place.empty()
        if self.is_late():  # no more behind it
            return
        for place in self._places:
            if place.offset == _NOTHING and not place.is_filling and expected:
                self._fill(place, expected.pop(0), ranges_of)

    def _fill(
        self,
        place: _Place,
        offset: int,
        ranges_of: Callable[[int, int], Sequence[FileRange] | None],
    ) -> None:
        if self._ring.is_broken or (place.ends is None and not self._open(place)):
            return
        ranges = ranges_of(offset, _READ_BYTES)
        if not ranges or place.ends is None:
            return
        place.begun = monotonic()
        begun = self._ring.begin(place.number, ranges, place.ends[1])
        if begun:
            place.offset = offset
            place.last_length = ranges[-1][2]
        # What was taken of a chain that was not begun may yet go into the pipe, or into what has
        # its number then: it stays open.
        place.is_filling = begun or self._ring.is_broken

    def _open(self, place: _Place) -> bool:
        if not self._patience:
            return False
        with suppress(OSError):
            place.ends = open_pipe()
        self._patience = self._patience - 1 if place.ends is None else _PATIENCE
        return place.ends is not None

    def is_late(self) -> bool:
        """Whether a chain waits for a file, it seems, so that whatever is begun waits with it."""
        limit = monotonic() - _LATE
        return any(place.is_filling and place.begun < limit for place in self._places)

    def filled(self, done: Done) -> float:
        """Take notice that a chain is done.

        Returns:
            When it was begun (`monotonic`).
        """
        place = self._places[done.number - self._first_number]
        place.is_filling = False
        if place.offset == _NOTHING or done.result != place.last_length or not done.is_last:
            place.empty()
        return place.begun

    def take(self, offset: int, size: int, move: Callable[[int], bool]) -> bool:
        """Give away the data of a READ.

        Args:
            offset: Where it begins.
            size: Bytes.
            move: Called with the pipe's output, from which it takes all of them.

        Returns:
            What `move` does, which is false if it could not; false as well if they are not there.
        """
        for place in self._places:
            if place.offset == offset and size == _READ_BYTES and not place.is_filling:
                place.offset = _NOTHING
                is_fresh = place.begun > monotonic() - _FRESH
                if is_fresh and place.ends is not None and move(place.ends[0]):
                    return True
                place.empty()
                return False
        return False

    def forget(self) -> None:
        """Let go of all that was gathered, and of the pipes."""
        self.is_wanted = False
        for place in self._places:
            if place.ends is not None:
                place.empty()

    def close(self) -> None:
        """Close the pipes. Nothing is under way, and the ring is closed."""
        for place in self._places:
            place.close()
