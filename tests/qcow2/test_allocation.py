"""Host clusters: which are taken, when they come back, and what keeps that from going wrong."""

from __future__ import annotations

from pathlib import Path

from imagofs.access import FormatAccess
from imagofs.gate import PermissiveImplicitOpenGate
from imagofs.opening import open_image
from tests import qemu
from tests.support.qcow2_oracle import check, data_clusters, read_disk


async def writable(path: Path, metadata_bytes: int | None = None) -> FormatAccess:
    return await open_image(
        path, writable=True, gate=PermissiveImplicitOpenGate(), metadata_bytes=metadata_bytes
    )


def assert_sound(path: Path, contents: bytes | bytearray) -> None:
    image = path.read_bytes()
    verdict = check(image)
    assert not verdict.errors
    assert not verdict.leaked
    qemu.check(path)
    assert read_disk(image) == contents


async def test_freed_neighbours_that_two_blocks_count_stay_two(new_image) -> None:
    size = 256 << 10
    path = new_image(size, cluster_size=512, refcount_bits=64, writes=[f"write -q -P 1 0 {size}"])
    contents = bytearray(b"\1") * size
    guest_of = {host >> 9: guest for guest, host in data_clusters(path.read_bytes()).items()}
    # A block counts 64 clusters.
    last = next(host for host in guest_of if host % 64 == 63 and host + 1 in guest_of)
    image = await writable(path)
    for host in (last, last + 1):
        await image.discard_to_zero(guest_of[host], 512)
    await image.flush()
    for host in (last, last + 1):
        await image.write(b"\2" * 512, guest_of[host])
        contents[guest_of[host] : guest_of[host] + 512] = b"\2" * 512
    for host in (last, last + 1):
        await image.discard_to_zero(guest_of[host], 512)
    await image.flush()
    # Both at once: one run of two clusters would be counted by one block.
    for start in (guest_of[last], guest_of[last + 1]):
        contents[start : start + 512] = bytes(512)
    both = min(guest_of[last], guest_of[last + 1])
    if abs(guest_of[last] - guest_of[last + 1]) == 512:
        await image.write(b"\3" * 1024, both)
        contents[both : both + 1024] = b"\3" * 1024
    await image.close()
    assert_sound(path, contents)


async def test_a_freed_cluster_whose_block_was_forgotten(new_image) -> None:
    size = 32 << 20
    path = new_image(size, cluster_size=512, writes=["write -q -P 1 0 200k"])
    contents = bytearray(size)
    contents[: 200 << 10] = b"\1" * (200 << 10)
    image = await writable(path, metadata_bytes=1)
    # Clusters are taken from behind this one on, unless one before it is known to be free.
    await image.write(b"\4" * 512, 30 << 20)
    contents[30 << 20 : (30 << 20) + 512] = b"\4" * 512
    await image.discard_to_zero(4096, 512)
    await image.flush()
    buffer = bytearray(1 << 20)
    for start in range(0, size, len(buffer)):  # fills the cache with other tables
        await image.read(buffer, start)
    await image.write(b"\2" * 1024, 8192 - 512)
    await image.write(b"\3" * 512, 20 << 20)
    contents[4096 : 4096 + 512] = bytes(512)
    contents[8192 - 512 : 8192 + 512] = b"\2" * 1024
    contents[20 << 20 : (20 << 20) + 512] = b"\3" * 512
    await image.close()
    assert_sound(path, contents)
