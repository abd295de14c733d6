"""Vectors of buffers: views of the caller's memory, never copies."""

import array
import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.errors import OutOfRangeError
from imagofs.vectors import (
    IoVector,
    IoVectorMut,
    fill_view,
    flat_view,
    flat_views,
    is_address_aligned,
    split_views,
    total_length,
    views_aligned,
    zero_views,
)

BUFFERS = {
    "bytearray": lambda: bytearray(24),
    "memoryview": lambda: memoryview(bytearray(30))[3:27],
    "array": lambda: array.array("I", [0] * 6),
    "numpy": lambda: np.zeros((2, 3), np.uint32),
    "numpy big-endian": lambda: np.zeros(3, ">u8"),
    "ctypes": lambda: (ctypes.c_uint64 * 3)(),
}


@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS)
def test_anything_with_the_buffer_protocol_is_read_and_written_in_place(make):
    buffer = make()
    vector = IoVectorMut([buffer])
    assert len(vector) == 24
    vector.copy_from(bytes(range(24)))
    assert bytes(memoryview(buffer)) == bytes(range(24))
    vector.fill(7)
    assert bytes(memoryview(buffer)) == b"\7" * 24
    assert IoVector([buffer]).to_bytes() == b"\7" * 24


def test_guest_memory_in_an_mmap():
    with mmap.mmap(-1, 8192) as memory:
        vector = IoVectorMut([memoryview(memory)[4096:4100]])
        vector.copy_from(b"abcd")
        assert memory[4095:4101] == b"\0abcd\0"
        for view in vector:
            view.release()
        del vector


def test_read_only_buffers_are_a_source_only():
    for buffer in (b"abc", memoryview(b"abc"), memoryview(bytearray(3)).toreadonly()):
        assert len(IoVector([buffer])) == 3
        with pytest.raises(TypeError, match="read-only"):
            IoVectorMut([buffer])
        with pytest.raises(TypeError, match="read-only"):
            IoVectorMut().push(buffer)
        with pytest.raises(TypeError, match="read-only"):
            IoVectorMut().insert(0, buffer)
        with pytest.raises(TypeError, match="read-only"):
            IoVectorMut().append(IoVector([buffer]))


def test_what_is_no_flat_memory_is_refused():
    wrongs: list[Any] = [5, "text", None, np.zeros(6)[::2], memoryview(bytearray(6))[::2]]
    for wrong in wrongs:
        with pytest.raises(TypeError):
            flat_view(wrong)
        with pytest.raises(TypeError):
            IoVector([wrong])


def test_empty_buffers_are_left_out():
    empty: Any = np.zeros((0, 4))
    empties = [b"", bytearray(), array.array("Q"), empty, memoryview(b"abc")[3:]]
    assert len(IoVector(empties)) == 0
    assert IoVector([b"a", *empties, b"b"]).views == [b"a", b"b"]
    assert flat_views(empties) == []
    assert flat_view(empty).nbytes == 0
    assert not flat_view(empty).readonly


def test_flat_views_of_one_of_several_and_of_a_vector():
    vector = IoVector([b"ab", b"cd"])
    assert flat_views(vector) is vector.views
    assert flat_views(b"ab") == [b"ab"]
    assert flat_views([b"ab", bytearray(b"c")]) == [b"ab", b"c"]
    assert flat_views(iter([b"ab"])) == [b"ab"]
    number: Any = 5
    with pytest.raises(TypeError):
        flat_views(number)


def test_push_insert_append():
    vector = IoVector()
    vector.push(b"cd")
    vector.insert(0, b"ab")
    vector.append(IoVector([b"", b"ef"]))
    vector.push(b"")
    vector.insert(1, b"")
    assert vector.to_bytes() == b"abcdef"
    assert [bytes(view) for view in vector] == [b"ab", b"cd", b"ef"]
    assert repr(vector) == "IoVector(3 buffers, 6 bytes)"


def test_copies_need_the_same_length():
    vector = IoVectorMut([bytearray(2), bytearray(3)])
    for length in (0, 4, 6):
        with pytest.raises(OutOfRangeError):
            vector.copy_from(bytes(length))
        with pytest.raises(OutOfRangeError):
            vector.copy_into(bytearray(length))
    target = bytearray(5)
    vector.copy_from(b"hello")
    vector.copy_into(target)
    assert target == b"hello"


pieces = st.lists(st.binary(max_size=9), max_size=8)


@given(pieces=pieces, data=st.data())
def test_splits_are_views_of_the_same_memory(pieces, data):
    buffers = [bytearray(piece) for piece in pieces]
    whole = b"".join(pieces)
    vector = IoVectorMut(buffers)
    cut = data.draw(st.integers(0, len(whole)))
    head, tail = vector.split_at(cut)
    assert type(head) is type(tail) is IoVectorMut
    assert (head.to_bytes(), tail.to_bytes()) == (whole[:cut], whole[cut:])
    assert vector.to_bytes() == whole
    assert all(view.nbytes for view in [*head, *tail])
    tail.fill(1)
    assert b"".join(buffers) == whole[:cut] + b"\1" * (len(whole) - cut)
    kept = IoVectorMut(buffers)
    rest = kept.split_tail_at(cut)
    assert (len(kept), len(rest)) == (cut, len(whole) - cut)
    for wrong in (-1, len(whole) + 1):
        with pytest.raises(OutOfRangeError):
            vector.split_at(wrong)
        with pytest.raises(OutOfRangeError):
            vector.split_tail_at(wrong)
    assert vector.to_bytes() == b"".join(buffers)


@given(pieces=pieces, cut=st.integers(0, 80))
def test_split_views_behind_the_end_takes_all(pieces, cut):
    views = [memoryview(piece) for piece in pieces]
    head, tail = split_views(views, cut)
    whole = b"".join(pieces)
    assert (b"".join(head), b"".join(tail)) == (whole[:cut], whole[cut:])
    assert total_length(views) == len(whole)


@pytest.mark.parametrize("length", [0, 1, 65535, 65536, 65537, 200_000])
def test_fill_and_zeroes(length):
    for value in (0, 1, 255):
        buffer = bytearray(b"\xee" * (length + 2))
        fill_view(memoryview(buffer)[1 : length + 1], value)
        assert buffer == b"\xee" + bytes([value]) * length + b"\xee"
    zeroes = zero_views(length)
    assert b"".join(zeroes) == bytes(length)
    assert all(view.readonly for view in zeroes)


def test_alignment():
    with mmap.mmap(-1, 8192) as memory, memoryview(memory) as view:
        for start, alignment, expected in [
            (0, 4096, True),
            (512, 512, True),
            (512, 1024, False),
            (1, 2, False),
            (1, 1, True),
        ]:
            with view[start : start + 512] as part:
                assert is_address_aligned(part, alignment) == expected
        with view[:4096] as first, view[4096 : 4096 + 512] as second:
            vector = IoVector([first, second])
            assert vector.is_aligned(4096, 512)
            assert not vector.is_aligned(4096, 1024)
            assert not vector.is_aligned(8192, 512)  # two pages in a row cannot both be
            assert views_aligned([first], 4096, 4096)
            del vector
    # The address of read-only memory cannot be asked for.
    assert not is_address_aligned(memoryview(bytes(4096)), 512)
    assert is_address_aligned(memoryview(b""), 512)
