"""What is parsed without a mount: the FUSE protocol, options, the table of mounts, failures."""

from __future__ import annotations

import errno
import logging
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagofs.cli.options import MountOptions, OptionError, parse_options, split_options
from imagofs.daemon import default_name
from imagofs.errors import CorruptImageError, ReadOnlyError, StorageError
from imagofs.fuse import mounts, protocol
from imagofs.fuse.errors import FailureLog, Refusal
from imagofs.fuse.session import escape_option

# --- protocol --------------------------------------------------------------------------


def in_header(opcode: int, unique: int, body: bytes) -> memoryview:
    """A request."""
    length = 40 + len(body)
    return memoryview(
        bytearray(struct.pack("=IIQQIIIHH", length, opcode, unique, 2, 0, 0, 1, 0, 0) + body)
    )


def test_read_and_write_requests() -> None:
    body = struct.pack("=QQIIQII", 5, 1 << 40, 4096, 0, 0, 0, 0)
    length, opcode, unique, handle, offset, size = protocol.DATA_IN.unpack_from(
        in_header(protocol.READ, 77, body)
    )
    assert (length, opcode, unique, handle, offset, size) == (80, 15, 77, 5, 1 << 40, 4096)
    assert len(in_header(protocol.WRITE, 1, body)) == protocol.WRITE_DATA_OFFSET


def test_other_requests() -> None:
    lseek = in_header(protocol.LSEEK, 1, struct.pack("=QQII", 9, 1 << 41, os.SEEK_HOLE, 0))
    assert protocol.LSEEK_IN.unpack_from(lseek, 40) == (1 << 41, os.SEEK_HOLE)
    space = in_header(protocol.FALLOCATE, 1, struct.pack("=QQQII", 9, 10, 20, 3, 0))
    assert protocol.FALLOCATE_IN.unpack_from(space, 40) == (10, 20, 3)
    copy = in_header(protocol.COPY_FILE_RANGE, 1, struct.pack("=QQQQQQQ", 9, 10, 2, 9, 20, 30, 0))
    assert protocol.COPY_FILE_RANGE_IN.unpack_from(copy, 40) == (10, 20, 30)


def test_replies() -> None:
    assert struct.unpack("=IiQ", protocol.error_reply(7, errno.EIO)) == (16, -errno.EIO, 7)
    assert struct.unpack("=IiQII", protocol.written_reply(7, 512)) == (24, 0, 7, 512, 0)
    assert struct.unpack("=IiQQ", protocol.offset_reply(7, 1 << 40)) == (24, 0, 7, 1 << 40)
    assert protocol.copied_reply(7, 1 << 40, wide=True) == protocol.offset_reply(7, 1 << 40)
    assert protocol.copied_reply(7, 5, wide=False) == protocol.written_reply(7, 5)
    assert struct.unpack("=IiQQqq", protocol.invalidate_inode(2, 3, 4)) == (40, 2, 0, 2, 3, 4)


def init_reply(flags: int, max_write: int = 1 << 20, max_pages: int = 256) -> memoryview:
    """INIT's reply as libfuse makes it."""
    body = struct.pack(
        "=IIIIHHIIHHI28x", 7, 38, 131072, flags & 0xFFFFFFFF, 0, 0, max_write, 1, max_pages, 0,
        flags >> 32,
    )  # fmt: skip
    return memoryview(bytearray(struct.pack("=IiQ", 16 + len(body), 0, 1) + body))


def test_amending_init() -> None:
    offered = 0xFFFF_FFFF_FFFF_FFFF
    request = in_header(
        protocol.INIT, 1, struct.pack("=IIIII44x", 7, 45, 131072, 0xFFFFFFFF, 0xFFFFFFFF)
    )
    assert protocol.offered_features(request) == offered
    short = in_header(protocol.INIT, 1, struct.pack("=IIII", 7, 31, 131072, 0x1234))
    assert protocol.offered_features(short) == 0x1234
    amendments = protocol.Amendments(
        wanted=protocol.HANDLE_KILLPRIV_V2 | protocol.DIRECT_IO_ALLOW_MMAP,
        unwanted=protocol.AUTO_INVAL_DATA | protocol.ATOMIC_O_TRUNC,
        max_background=256,
    )
    reply = init_reply(1 << 0 | 1 << 3 | 1 << 12, max_write=1 << 24, max_pages=4096)
    features = protocol.amend_init(reply, offered, amendments)
    assert features == 1 << 0 | 1 << 28 | 1 << 30 | 1 << 36
    fields = struct.unpack_from("=IIIIHHIIHHI", reply, 16)
    assert fields == (7, 38, 131072, 1 | 1 << 28 | 1 << 30, 256, 192, 512 << 10, 1, 128, 0, 1 << 4)
    # What the kernel does not offer is not asked for.
    assert protocol.amend_init(init_reply(1), 1, amendments) == 1
    # An error stays as it is.
    error = memoryview(bytearray(protocol.error_reply(1, errno.EPROTO)))
    assert protocol.amend_init(error, offered, amendments) == 0
    assert bytes(error) == protocol.error_reply(1, errno.EPROTO)


def test_amending_open() -> None:
    reply = memoryview(bytearray(struct.pack("=IiQQII", 32, 0, 1, 5, 2, 0)))
    protocol.amend_open(reply, protocol.FOPEN_NOFLUSH)
    assert struct.unpack("=IiQQII", reply)[4] == 2 | 1 << 5
    error = memoryview(bytearray(protocol.error_reply(1, errno.EROFS)))
    protocol.amend_open(error, protocol.FOPEN_NOFLUSH)
    assert bytes(error) == protocol.error_reply(1, errno.EROFS)


def test_room_of_replies() -> None:
    getxattr = in_header(protocol.GETXATTR, 1, struct.pack("=II", 65536, 0) + b"user.x\0")
    assert protocol.reply_limit(getxattr) == 65536 + 512
    assert protocol.reply_limit(in_header(3, 1, bytes(16))) == 512


# --- options --------------------------------------------------------------------------


def test_options() -> None:
    assert parse_options([]) == MountOptions()
    found = parse_options(["rw,allow_other,uid=7,gid=0,mode=640", "name=a\\,b,format=raw"])
    assert found == MountOptions(
        writable=True, allow_other=True, uid=7, gid=0, mode=0o640, name="a,b", format="raw"
    )
    assert parse_options(["rw,ro"]) == MountOptions()
    assert parse_options(["allow=/a,allow=/b\\\\c"]).allow == ("/a", "/b\\c")
    assert parse_options(["allow=.,allow=b"]).allow == (os.getcwd(), f"{os.getcwd()}/b")
    assert parse_options(["uid=root"]).uid == 0
    sizes = parse_options(["metadata_cache=4M,inflate_cache=1g"])
    assert (sizes.metadata_bytes, sizes.inflated_bytes) == (4 << 20, 1 << 30)
    assert parse_options(["defaults,nofail,noauto,_netdev,x-gvfs-hide,comment=y"]) == MountOptions()
    kernel = parse_options(["nosuid,relatime,noexec,suid", "async"]).kernel
    assert kernel == ("suid", "noexec", "async")
    assert parse_options(["noatime"]).kernel == ("noatime",)
    assert parse_options(["noatime,atime"]).kernel == ()  # some libfuse know no `atime`
    assert parse_options([",,ro,"]) == MountOptions()
    assert parse_options(["X-mount.mkdir"]).mkdir == 0o755
    assert parse_options(["x-mount.mkdir=0700"]).mkdir == 0o700


@pytest.mark.parametrize(
    "text", ["x", "X-mount.mkdir=9", "uid=-1", "uid=4294967295", "mode=1777", "allow", "ro=x"]
)
def test_wrong_options(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_options([text])
    assert text.partition("=")[0] in str(caught.value)


@given(st.lists(st.text(min_size=1), min_size=1))
def test_quoting_is_undone(values: list[str]) -> None:
    assert split_options(",".join(escape_option(value) for value in values)) == values


@pytest.mark.parametrize(
    "image, name", [("/a/b.qcow2", "b.raw"), ("/a/b", "b.raw"), ("/a/b.raw", "b.raw")]
)
def test_default_name(image: str, name: str) -> None:
    assert default_name(image) == name


# --- mounts --------------------------------------------------------------------------


def test_table_of_mounts() -> None:
    root = mounts.find_at("/")
    assert root is not None and root.point == "/" and root.owner == -1
    line = (
        b"36 35 0:45 / /mnt/a\\040b\\134c ro,nosuid shared:1 master:2 - fuse.imagofs /x\\011y.img "
        b"ro,user_id=1000,group_id=1000,default_permissions\n"
    )
    assert mounts._parse(line) == mounts.Mount(
        "0:45", "/mnt/a b\\c", "fuse.imagofs", "/x\ty.img", 1000
    )
    assert mounts.real_path("/proc/self/../self/ns") == f"/proc/{os.getpid()}/ns"


# --- failures --------------------------------------------------------------------------


def test_failures_become_errnos(caplog: pytest.LogCaptureFixture) -> None:
    failures = FailureLog(logging.getLogger("imagofs.test"))
    assert failures.answer(Refusal(errno.ENXIO), "seek") == errno.ENXIO
    assert failures.answer(ReadOnlyError("no"), "write") == errno.EROFS
    assert not caplog.records
    full = StorageError("cannot write: full", error=errno.ENOSPC, filename="/x")
    for place in ("write at 0", "write at 512"):
        assert failures.answer(full, place) == errno.ENOSPC
    assert [record.getMessage() for record in caplog.records] == [
        "cannot write at 0: /x: cannot write: full (answered with ENOSPC)"
    ]
    caplog.clear()
    assert failures.answer(CorruptImageError("bad\nentry"), "read") == errno.EIO
    assert failures.answer(ZeroDivisionError("oops"), "read") == errno.EIO
    assert failures.answer(MemoryError(), "read") == errno.ENOMEM
    lines = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert len(lines) == 3 and all("\n" not in line for line in lines)
    caplog.clear()
    for number in range(1000):  # what is remembered is bounded
        failures.answer(CorruptImageError(f"entry {number}"), "read")
    assert len(failures._logged) <= 64
