"""Inflating: exact lengths, hostile streams, every library; the cache's bounds; the threads."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from imagofs import inflating
from imagofs.errors import UnsupportedError
from imagofs.inflating import (
    InflatedCache,
    InflateError,
    InflateThreads,
    inflate_deflate,
    inflate_zstd,
    zstd_frame_end,
)

CLUSTER = 65536
MIB = 1 << 20


@cache
def prose(length: int, seed: int = 1) -> bytes:
    """Words, as compressible as text is."""
    words = random.Random(seed)
    vocabulary = [bytes(words.choices(b"etaoinshrdlu", k=words.randint(2, 9))) for _ in range(500)]
    text = b" ".join(words.choices(vocabulary, k=length // 3 + 1))
    return text[:length]


def deflate(data: bytes, window_bits: int = -12) -> bytes:
    """Raw deflate, with the window that qemu uses unless told otherwise."""
    stream = zlib.compressobj(9, zlib.DEFLATED, window_bits, 9)
    return stream.compress(data) + stream.flush()


def zstd(data: bytes, *, size: bool = True, checksum: bool = False, level: int = 3) -> bytes:
    """One zstd frame; `size`: with the content's size in its header."""
    return zstandard.ZstdCompressor(
        level=level, write_content_size=size, write_checksum=checksum
    ).compress(data)


def peak_bytes(work: Callable[[], object]) -> int:
    """How much the resident memory grew at its highest during `work`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def status(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)

    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.fixture(params=["best", "standard"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The fastest libraries, and those that are left without them."""
    if request.param == "standard":
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
        monkeypatch.setitem(sys.modules, "zstandard", None)
    inflating.deflate_library.cache_clear()
    inflating.zstd_library.cache_clear()
    yield request.param
    inflating.deflate_library.cache_clear()
    inflating.zstd_library.cache_clear()


CONTENTS = {
    "prose": lambda length: prose(length),
    "random": lambda length: random.Random(3).randbytes(length),
    "zeroes": lambda length: bytes(length),
    "mixed": lambda length: (
        (prose(length // 2) + random.Random(4).randbytes(length))[: length // 2] * 3
    )[:length],
}


def test_which_libraries_are_used(library: str) -> None:
    module = inflating.zstd_library().broken.__module__
    isal = inflating.deflate_library()[0] is not zlib.decompressobj
    if library == "best":
        assert (module.partition(".")[0], isal) == ("zstandard", True)
    else:
        assert "zstandard" not in module
        assert not isal


# --- good streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("length", [512, 4096, CLUSTER, 2 * MIB])
def test_round_trip(library: str, kind: str, length: int) -> None:
    data = CONTENTS[kind](length).ljust(length, b"x")
    for window_bits in (-12, -15):
        assert inflate_deflate(deflate(data, window_bits), length) == data
    for options in ({}, {"size": False}, {"checksum": True}, {"size": False, "checksum": True}):
        assert inflate_zstd(zstd(data, **options), length) == data


def test_any_buffer_is_taken(library: str) -> None:
    data = prose(4096)
    for compress, inflate in ((deflate, inflate_deflate), (zstd, inflate_zstd)):
        stream = compress(data)
        padded = bytearray(b"##" + stream + b"##")
        assert inflate(memoryview(padded)[2:-2], 4096) == data
        assert inflate(bytearray(stream), 4096) == data
        assert type(inflate(stream, 4096)) is bytes


@pytest.mark.parametrize("size", [True, False])
def test_what_follows_the_stream_is_ignored(library: str, size: bool) -> None:
    # The last sector of a cluster goes on with the next cluster, or with anything.
    data = prose(CLUSTER)
    for rest in (b"\0", bytes(511), b"\xff" * 511, random.Random(5).randbytes(300)):
        assert inflate_deflate(deflate(data) + rest, CLUSTER) == data
        assert inflate_zstd(zstd(data, size=size) + rest, CLUSTER) == data
    following = prose(CLUSTER, seed=2)
    assert inflate_deflate(deflate(data) + deflate(following)[:400], CLUSTER) == data
    assert inflate_zstd(zstd(data, size=size) + zstd(following)[:400], CLUSTER) == data
    assert inflate_zstd(zstd(data, size=size) + zstd(following), CLUSTER) == data


def test_zstd_frames_that_make_a_cluster_together(library: str) -> None:
    data = prose(CLUSTER)
    for size in (True, False):
        parts = [zstd(data[at : at + 4096], size=size) for at in range(0, CLUSTER, 4096)]
        assert inflate_zstd(b"".join(parts), CLUSTER) == data
        assert inflate_zstd(b"".join(parts) + b"trailing", CLUSTER) == data
    skippable = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    assert inflate_zstd(skippable + zstd(data), CLUSTER) == data
    assert inflate_zstd(zstd(b"") + zstd(data), CLUSTER) == data


def test_zstd_frames_are_bounded_in_number(library: str) -> None:
    data = prose(512)
    for many in (zstd(b"") * 100_000, b"\x50\x2a\x4d\x18\0\0\0\0" * 100_000):
        started = time.thread_time()
        with pytest.raises(InflateError, match="ends before 512 bytes"):
            inflate_zstd(many + zstd(data), 512)
        assert time.thread_time() - started < 1


# --- broken and hostile streams -----------------------------------------------------------------


@pytest.mark.parametrize("inflate", [inflate_deflate, inflate_zstd])
def test_nothing_inflates_to_nothing(library: str, inflate: Callable[[bytes, int], bytes]) -> None:
    with pytest.raises(InflateError):
        inflate(b"", 512)


@pytest.mark.parametrize("size", [True, False])
def test_streams_that_are_cut_off(library: str, size: bool) -> None:
    data = prose(4096)
    for stream, inflate in (
        (deflate(data), inflate_deflate),
        (zstd(data, size=size), inflate_zstd),
        (zstd(data[:2048]) + zstd(data[2048:], size=size), inflate_zstd),
    ):
        assert inflate(stream, 4096) == data
        refused = 0
        for end in range(len(stream)):
            try:
                # The last bits of deflate may be an end mark that nobody needs.
                assert inflate(stream[:end], 4096) == data
                assert end >= len(stream) - 2
            except InflateError:
                refused += 1
        assert refused >= len(stream) - 2


def test_streams_that_are_too_short_or_too_long(library: str) -> None:
    data = prose(4096)
    with pytest.raises(InflateError, match="ends after 4096 of 4097 bytes"):
        inflate_deflate(deflate(data), 4097)
    for size in (True, False):
        with pytest.raises(InflateError, match="ends before 4097 bytes"):
            inflate_zstd(zstd(data, size=size), 4097)
        with pytest.raises(InflateError, match="goes on after 4095 bytes"):
            inflate_zstd(zstd(data, size=size), 4095)
    # As qemu does: deflate is cut where the cluster ends.
    assert inflate_deflate(deflate(data), 4095) == data[:4095]


def test_a_wrong_checksum_is_noticed(library: str) -> None:
    stream = bytearray(zstd(prose(4096), checksum=True))
    stream[-1] ^= 1
    with pytest.raises(InflateError, match="broken zstd stream"):
        inflate_zstd(stream, 4096)


@pytest.mark.parametrize("frames", [{}, {"size": False}])
def test_bombs_cost_no_more_than_a_cluster(library: str, frames: dict[str, bool]) -> None:
    bomb = deflate(bytes(64 * MIB), -15)
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=frames.get("size", True))
    zstd_bomb = compressor.compress(bytes(64 * MIB))
    inflate_deflate(deflate(bytes(CLUSTER)), CLUSTER)  # imports
    inflate_zstd(zstd(bytes(CLUSTER)), CLUSTER)

    def work() -> None:
        assert inflate_deflate(bomb, CLUSTER) == bytes(CLUSTER)
        with pytest.raises(InflateError):
            inflate_zstd(zstd_bomb, CLUSTER)

    started = time.thread_time()
    assert peak_bytes(work) < 12 * MIB  # a zstd window of up to 8 MiB
    assert time.thread_time() - started < 1


def test_a_frame_that_claims_to_be_huge(library: str) -> None:
    frame = bytearray(zstd(prose(CLUSTER)))
    descriptor = frame[4]
    assert descriptor >> 5 & 1, "qemu's frames are single segments, too"
    # The same frame, with a content size of 2**40 bytes.
    header = frame[:4] + bytes([descriptor | 0xC0]) + (1 << 40).to_bytes(8, "little")
    width = {0: 1, 1: 2, 2: 4, 3: 8}[descriptor >> 6]
    lying = bytes(header + frame[5 + width :])

    def work() -> None:
        with pytest.raises(InflateError):
            inflate_zstd(lying, CLUSTER)

    assert peak_bytes(work) < 4 * MIB


def test_a_frame_with_a_huge_window(library: str) -> None:
    data = prose(CLUSTER)
    frame = bytearray(zstd(data, size=False))
    assert not frame[4] >> 5 & 1
    frame[5] = 21 - 10 << 3  # 2 MiB
    assert inflate_zstd(frame, CLUSTER) == data
    frame[5] = 27 - 10 << 3  # 128 MiB

    def work() -> None:
        with pytest.raises(InflateError):
            inflate_zstd(frame, CLUSTER)

    assert peak_bytes(work) < 4 * MIB


@given(st.binary(max_size=600), st.sampled_from([1, 512, 4096]))
@example(b"\x28\xb5\x2f\xfd", 1)
@example(b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8, 1)
@example(b"\x50\x2a\x4d\x18\xff\xff\xff\xff", 1)
def test_any_bytes(data: bytes, length: int) -> None:
    for inflate in (inflate_deflate, inflate_zstd):
        try:
            assert len(inflate(data, length)) == length
        except InflateError as error:
            assert str(error)


@given(st.data())
def test_damaged_streams(data: st.DataObject) -> None:
    plain = prose(2048)
    options = data.draw(st.sampled_from([{}, {"size": False}, {"checksum": True}]))
    for compress, inflate in (
        (deflate, inflate_deflate),
        (lambda plain: zstd(plain, **options), inflate_zstd),
    ):
        stream = bytearray(compress(plain))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(stream) - 1))
            stream[at] = data.draw(st.integers(0, 255))
        try:
            assert len(inflate(stream, 2048)) == 2048
        except InflateError as error:
            assert str(error)


@given(st.binary(max_size=2000), st.binary(max_size=20), st.booleans(), st.booleans())
def test_where_a_frame_ends(plain: bytes, rest: bytes, size: bool, checksum: bool) -> None:
    frame = zstd(plain, size=size, checksum=checksum)
    assert zstd_frame_end(memoryview(frame + rest)) == len(frame)
    for end in range(len(frame)):
        with pytest.raises(InflateError):
            zstd_frame_end(memoryview(frame[:end]))


def test_frames_of_several_blocks() -> None:
    plain = random.Random(6).randbytes(300_000) + bytes(300_000) + prose(300_000)
    frame = zstd(plain)
    assert zstd_frame_end(memoryview(frame + b"rest")) == len(frame)


def test_no_library_for_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    inflating.zstd_library.cache_clear()
    with pytest.raises(UnsupportedError, match="zstandard"):
        inflate_zstd(zstd(bytes(512)), 512)


def test_several_threads_inflate_at_the_same_time(library: str) -> None:
    plain = [prose(CLUSTER, seed) for seed in range(8)]
    streams = [(deflate(data), zstd(data), data) for data in plain]
    wrong: list[object] = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(60):
            deflated, frame, data = order.choice(streams)
            if inflate_deflate(deflated, CLUSTER) != data or inflate_zstd(frame, CLUSTER) != data:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- the cache ----------------------------------------------------------------------------------


def test_the_cache_is_bounded() -> None:
    cache = InflatedCache(40 * 1000)
    for key in range(500):
        cache.put(key, bytes(1000))
        assert cache.bytes_held() <= 40 * 1000
    assert cache.get(499) is not None
    assert cache.get(0) is None
    for key in range(1000, 1500):
        cache.put_ahead({key: bytes(1000)})
        assert cache.bytes_held() <= 40 * 1000
    assert 5 <= len(cache.ahead) <= 10
    assert cache.get(499) is not None, "read-ahead displaced what is used"


def test_what_is_used_stays() -> None:
    cache = InflatedCache(40 * 1000)
    cache.put(7, b"hot" * 300)
    for key in range(1000, 2000):
        assert cache.get(7) == b"hot" * 300
        cache.put(key, bytes(1000))


def test_a_cache_that_is_too_small_keeps_the_newest() -> None:
    cache = InflatedCache(0)
    cache.put(1, bytes(1000))
    assert cache.get(1) == bytes(1000)
    cache.put_ahead({2: bytes(1000)})
    assert cache.get(2) == bytes(1000)
    for key in range(10):
        cache.put(key, bytes(1000))
        cache.put_ahead({key + 100: bytes(1000)})
    assert cache.bytes_held() < 4000


def test_what_was_inflated_ahead_leaves_first_in_first_out_read_or_not() -> None:
    cache = InflatedCache(40 * 1000)
    for key in range(26):
        cache.put(key, bytes(1000))
    used = {*cache.young, *cache._old}
    for key in range(100, 200):
        cache.put_ahead({key: bytes([key]) * 1000})
        assert cache.get(100) == (bytes([100]) * 1000 if key < 108 else None)
        assert cache.get(key) == bytes([key]) * 1000
    assert list(cache.ahead) == list(range(192, 200))
    assert {*cache.young, *cache._old} == used == set(range(26)), "a pass displaces nothing"


def test_a_pass_fills_the_room_that_nothing_else_needs() -> None:
    shared = memoryview(bytes(range(200)) * 1000)
    cache = InflatedCache(40 * 1000)
    cache.put(1, bytes(1000))
    for key in range(100, 200):
        cache.put_ahead({key: shared[key * 1000 :][:1000]})
    kept = cache.kept(range(100, 192))
    assert kept == {*range(100, 125)}, "the first ones: the next pass begins there"
    assert cache.bytes_held() <= 40 * 1000
    again = cache.get(100)
    assert again == shared[:1000]
    assert isinstance(again, bytes), "it no longer keeps what it shared memory with"
    assert 100 in cache.young
    # What is used has precedence.
    for key in range(2, 30):
        cache.put(key, bytes(1000))
    assert cache.kept(range(30)) >= {*range(10, 30)}
    assert cache.bytes_held() <= 40 * 1000
    cache.drop_range(0, 1 << 50)
    assert cache.bytes_held() == 0


@given(st.data())
def test_beginnings(data: st.DataObject) -> None:
    """Whatever the stream is like, also where it is not alike throughout."""
    kinds = st.sampled_from([bytes(9000), random.Random(3).randbytes(9000), b"some prose. " * 700])
    whole = b"".join(data.draw(st.lists(kinds, min_size=1, max_size=4)))
    compressor = zlib.compressobj(data.draw(st.integers(0, 9)), zlib.DEFLATED, -12)
    stream = compressor.compress(whole) + compressor.flush() + bytes(data.draw(st.integers(0, 600)))
    for length in (1, len(whole), data.draw(st.integers(1, len(whole)))):
        assert inflate_deflate(memoryview(stream), length, len(whole)) == whole[:length]
    with pytest.raises(InflateError):
        inflate_deflate(stream, len(whole) + 1, len(whole) + 1)


def test_no_more_is_inflated_than_a_beginning_needs() -> None:
    noise = random.Random(4).randbytes(64 << 10)
    compressor = zlib.compressobj(0, zlib.DEFLATED, -15)  # stored: each byte is where it was
    stream = bytearray(compressor.compress(noise) + compressor.flush())
    stream[40_000:] = b"\xff" * (len(stream) - 40_000)
    assert inflate_deflate(stream, 20_000, 64 << 10) == noise[:20_000]
    with pytest.raises(InflateError):
        inflate_deflate(stream, 64 << 10)


def test_namespaces_are_apart() -> None:
    cache = InflatedCache(MIB)
    one, two = cache.namespace(), cache.namespace()
    assert abs(one - two) >= 1 << 55, "room for every cluster of a disk of 2**64 bytes"
    cache.put(one + 5, b"one")
    cache.put(two + 5, b"two")
    cache.drop_range(one, 1 << 55)
    assert cache.get(one + 5) is None
    assert cache.get(two + 5) == b"two"


@given(st.lists(st.tuples(st.sampled_from("pagdr"), st.integers(0, 30), st.integers(1, 400))))
def test_the_cache_against_a_model(steps: list[tuple[str, int, int]]) -> None:
    cache = InflatedCache(4000)
    values: dict[int, bytes] = {}
    for number, (step, key, size) in enumerate(steps):
        data = number.to_bytes(4, "big") * size
        found: Any = None
        match step:
            case "p":
                cache.put(key, data)
                values[key] = data
                assert cache.get(key) == data
            case "a":
                cache.put_ahead({key: data, key + 1: data})
                values[key] = values[key + 1] = data
            case "g":
                found = cache.get(key)
            case "d":
                cache.drop(key)
                values.pop(key, None)
                assert cache.get(key) is None
            case "r":
                cache.drop_range(key, size)
                values = {k: v for k, v in values.items() if not key <= k < key + size}
        assert found is None or found == values[key]
        kept = cache.kept(range(10, 20))
        assert kept <= values.keys()
        assert cache.bytes_held() <= 4000 + 2 * 2000  # a cluster of each kind is always kept
        assert cache.bytes_held() >= 0
    cache.drop_range(0, 1 << 50)
    assert cache.bytes_held() == 0


def test_buffers_are_used_again() -> None:
    cache = InflatedCache(MIB)
    buffer = cache.take_buffer(1000)
    cache.give_buffer(buffer)
    assert cache.take_buffer(5000) is buffer
    large = cache.take_buffer(16 * MIB)
    assert len(large) >= 16 * MIB
    cache.give_buffer(large)
    assert cache.take_buffer(1000) is not large, "a buffer of unusual size is not kept"


# --- the threads --------------------------------------------------------------------------------


def wait(event: threading.Event) -> None:
    event.wait(10)


async def test_no_more_threads_than_the_limit() -> None:
    threads = InflateThreads(2)
    lock = threading.Lock()
    running = most = ended = 0
    finished = trio.Event()
    trio_thread = threading.get_ident()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    def done() -> None:
        nonlocal ended
        assert threading.get_ident() == trio_thread
        ended += 1
        if ended == 20:
            finished.set()

    for _ in range(20):
        threads.submit(work, done, lambda: True)
    with trio.fail_after(10):
        await finished.wait()
    assert most == 2


async def test_what_is_waited_for_overtakes() -> None:
    threads = InflateThreads(1)
    gate = threading.Event()
    order: list[str] = []
    finished = trio.Event()

    def block() -> None:
        gate.wait(10)

    threads.submit(block, lambda: None, lambda: False)
    threads.submit(lambda: order.append("ahead"), finished.set, lambda: False)
    threads.submit(lambda: order.append("wanted"), lambda: None, lambda: True)
    gate.set()
    with trio.fail_after(10):
        await finished.wait()
    assert order == ["wanted", "ahead"]


def test_the_loop_may_end_before_the_work() -> None:
    gate = threading.Event()
    worked = threading.Event()

    def work() -> None:
        gate.wait(10)
        worked.set()

    async def main() -> None:
        InflateThreads(1).submit(work, lambda: None, lambda: True)

    trio.run(main)
    gate.set()
    assert worked.wait(10)


async def test_work_is_done_where_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuse)
    steps: list[str] = []
    threads = InflateThreads(1)
    for _ in range(3):
        threads.submit(lambda: steps.append("work"), lambda: steps.append("done"), lambda: False)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert sorted(steps) == ["done"] * 3 + ["work"] * 3


async def test_the_loop_is_woken_for_what_is_awaited_and_at_the_end() -> None:
    threads = InflateThreads(1)
    gates = [threading.Event() for _ in range(3)]
    awaited = [False] * 3
    told = [trio.Event() for _ in range(3)]

    def submit(number: int) -> None:
        threads.submit(
            lambda: wait(gates[number]), lambda: told[number].set(), lambda: awaited[number]
        )

    for number in range(3):
        submit(number)
    awaited[1] = True
    gates[0].set()
    with trio.move_on_after(0.1):
        await told[0].wait()
    assert not told[0].is_set()
    for number in (1, 2):
        gates[number].set()
        with trio.fail_after(10):
            await told[number].wait()
        assert [event.is_set() for event in told] == [True, True, number == 2]


async def test_what_is_done_can_be_asked_for() -> None:
    threads = InflateThreads(1)
    blocked = threading.Event()
    worked = threading.Event()
    done: list[int] = []
    end = trio.Event()
    threads.submit(lambda: None, lambda: done.append(1), lambda: False)
    threads.submit(worked.set, lambda: done.append(2), lambda: False)
    threads.submit(lambda: wait(blocked), end.set, lambda: False)
    assert worked.wait(10)
    threads.settle()
    assert done in ([1], [1, 2])
    blocked.set()
    with trio.fail_after(10):
        await end.wait()
    assert done == [1, 2]


@pytest.mark.parametrize("refused", [False, True])
async def test_threads_are_in_the_background(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[int] = []
    restored = threading.Event()
    real = os.sched_setscheduler

    def recording(pid: int, policy: int, param: os.sched_param) -> None:
        if policy == os.SCHED_OTHER:
            restored.set()
        if refused:
            raise PermissionError("a sandbox")
        real(pid, policy, param)
        policies.append(os.sched_getscheduler(0))

    monkeypatch.setattr(os, "sched_setscheduler", recording)
    seen: list[int] = []
    finished = trio.Event()
    InflateThreads(1).submit(
        lambda: seen.append(os.sched_getscheduler(0)), finished.set, lambda: True
    )
    with trio.fail_after(10):
        await finished.wait()
    assert restored.wait(10)
    assert seen == [os.SCHED_OTHER if refused else os.SCHED_BATCH]
    assert policies[:1] == ([] if refused else [os.SCHED_BATCH])


async def test_work_goes_on_while_the_loop_is_busy() -> None:
    threads = InflateThreads(1)
    last = threading.Event()
    for _ in range(10):
        threads.submit(lambda: None, lambda: None, lambda: False)
    threads.submit(last.set, lambda: None, lambda: False)
    assert last.wait(10), "trio's thread was needed in between"
