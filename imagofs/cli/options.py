"""The options of a mount: what follows `-o`.

They are separated by commas; a backslash takes the special meaning from the letter after it, as in
`allow=/images/a\\,b`. Given twice, the later one counts. What mount(8) and fstab know is accepted
too: it is passed to the kernel, or concerns others than us.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

__all__ = ["Metrics", "MountOptions", "OptionError", "parse_options", "split_options"]

#: Passed on to the kernel as they are; of two that contradict each other the later one counts.
_KERNEL: Final = {
    **{prefix + name: name for name in ("suid", "dev", "exec") for prefix in ("", "no")},
    "noatime": "atime",
    "sync": "sync",
    "async": "sync",
    "dirsync": "dirsync",
}
#: For mount(8), fstab and systemd, or about access times that no FUSE mount keeps: nothing to do.
_IGNORED: Final = frozenset(
    ["defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "group", "owner"]
    + [
        prefix + name
        for name in ("diratime", "relatime", "strictatime", "lazytime")
        for prefix in ("", "no")
    ]
    + ["nousers", "nogroup", "noowner", "silent", "loud", "mand", "nomand"]
    # Nothing here is a symbolic link, or has a version.
    + ["symfollow", "nosymfollow", "iversion", "noiversion"]
)
#: The same, with or without a value; and the prefixes of what is for others.
_COMMENTS: Final = frozenset(["comment", "user"])
_FOR_OTHERS: Final = ("x-", "X-")


class OptionError(ValueError):
    """An option that is unknown or has a value that it cannot have."""


class Metrics(NamedTuple):
    """Where the statistics are to be found in Prometheus' text format.

    Attributes:
        path: Of the file, or of the socket.
        is_socket: It is a socket.
    """

    path: str
    is_socket: bool


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What `-o` asked for.

    Attributes:
        writable: `rw`.
        allow_other: `allow_other`.
        uid: `uid=`: owner of the file shown; None: as the image.
        gid: `gid=`: likewise its group.
        mode: `mode=`: likewise its permission bits.
        name: `name=`: name of the file in a directory mount; None: from the image's.
        format: `format=`; None: probe.
        deny: `deny`: open nothing that the image refers to.
        allow: `allow=`, perhaps several: open only below these directories; empty: anywhere.
        fsname: `fsname=`; None: the image's path.
        snapshot: `snapshot=`: show this internal snapshot.
        lock: `lock=`: take qemu's image locks; "auto": where the file system has such locks.
        mkdir: `X-mount.mkdir`, `X-mount.mkdir=`: make the mountpoint if it is missing, with these
            permission bits; None: do not.
        channel: `channel=`: use the data channel.
        awake: `awake=`: keep idle processors awake while that makes replies faster; "auto": where
            few are, and if it is possible.
        direct_io: `direct_io`: bypass the kernel's page cache.
        writeback: `writeback`: let the kernel keep written pages back.
        metadata_bytes: `metadata_cache=`; None: the default.
        inflated_bytes: `inflate_cache=`; None: the default.
        overlay: `overlay`, `overlay=`: writes go to an overlay, which is this file; empty: to a
            temporary one.
        setuid: `setuid=`: run as this user once the image is open and mounted.
        confine: `confine=`: give up what is not needed once it is mounted; "auto": as far as the
            kernel can do that.
        stop_timeout: `stop_timeout=`: seconds that SIGTERM waits for users; None: for ever.
        metrics: `metrics=`.
        kernel: Options for the kernel.
    """

    writable: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    name: str | None = None
    format: str | None = None
    deny: bool = False
    allow: tuple[str, ...] = ()
    fsname: str | None = None
    snapshot: str | None = None
    lock: bool | Literal["auto"] = "auto"
    mkdir: int | None = None
    channel: bool = True
    awake: bool | Literal["auto"] = "auto"
    direct_io: bool = False
    writeback: bool = False
    metadata_bytes: int | None = None
    inflated_bytes: int | None = None
    overlay: str | None = None
    setuid: int | None = None
    confine: bool | Literal["auto"] = "auto"
    stop_timeout: float | None = None
    metrics: Metrics | None = None
    kernel: tuple[str, ...] = ()


def split_options(text: str) -> list[str]:
    """Split at commas; a backslash quotes the letter after it. Empty options are left out."""
    options, current, quoted = [], "", False
    for letter in text:
        if quoted:
            current, quoted = current + letter, False
        elif letter == "\\":
            quoted = True
        elif letter == ",":
            options.append(current)
            current = ""
        else:
            current += letter
    options.append(current + "\\" * quoted)
    return [option for option in options if option]


def parse_options(texts: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """The options in `texts`, one text for each `-o`.

    Args:
        texts: The texts.
        sloppy: Pass over options that are not known.

    Raises:
        OptionError: The message names the option.
    """
    chosen: dict[str, Any] = {}
    allow: list[str] = []
    kernel: dict[str, str] = {}
    for option in (option for text in texts for option in split_options(text)):
        name, equals, value = option.partition("=")
        if option == "overlay":
            chosen["overlay"] = ""
        elif name in _FLAGS and not equals:
            key, setting = _FLAGS[name]
            chosen[key] = setting
        elif name == "allow" and value:
            allow.append(_absolute(value))
        elif name in _VALUES and value:
            key, parse = _VALUES[name]
            try:
                chosen[key] = parse(value)
            except ValueError as error:
                raise OptionError(f"option {option!r}: {error}") from None
        elif name in _VALUES or name == "allow":
            raise OptionError(f"option {name!r} needs a value: {name}=...")
        elif name in _FLAGS:
            raise OptionError(f"option {name!r} takes no value")
        elif option == "atime":
            kernel.pop(option, None)  # the default, whose name not every libfuse knows
        elif option in _KERNEL:
            kernel[_KERNEL[option]] = option
        elif name.lower() == "x-mount.mkdir":
            try:
                chosen["mkdir"] = _mode(value) if value else 0o755
            except ValueError as error:
                raise OptionError(f"option {option!r}: {error}") from None
        elif name in _COMMENTS or option in _IGNORED or name.startswith(_FOR_OTHERS) or sloppy:
            continue
        else:
            raise OptionError(f"unknown option {option!r}")
    if allow and chosen.get("deny"):
        raise OptionError("options 'deny' and 'allow' contradict each other")
    if chosen.get("snapshot") is not None and chosen.get("writable"):
        raise OptionError("a snapshot is read-only: options 'snapshot' and 'rw' do not go together")
    if chosen.get("awake") is True and chosen.get("channel") is False:
        raise OptionError("options 'awake=on' and 'channel=off' do not go together")
    if chosen.get("overlay") is not None:
        if chosen.get("snapshot") is not None:
            raise OptionError("options 'snapshot' and 'overlay' do not go together")
        chosen["writable"] = True
    return MountOptions(allow=tuple(allow), kernel=tuple(kernel.values()), **chosen)


def _file_name(value: str) -> str:
    if "/" in value or value in (".", "..") or len(value.encode(errors="surrogateescape")) > 255:
        raise ValueError("not a file name")
    return value


def _mode(value: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise ValueError("permission bits are octal digits from 0 to 777")
    return mode


def _user(value: str) -> int:
    def by_name(name: str) -> int:
        import pwd

        return pwd.getpwnam(name).pw_uid

    return _identity(value, "user", by_name)


def _group(value: str) -> int:
    def by_name(name: str) -> int:
        import grp

        return grp.getgrnam(name).gr_gid

    return _identity(value, "group", by_name)


def _identity(value: str, kind: str, by_name: Callable[[str], int]) -> int:
    if value.isascii() and value.isdigit():
        number = int(value)
    else:
        try:
            number = by_name(value)
        except KeyError:
            raise ValueError(f"no such {kind}") from None
    if number >= 2**32 - 1:
        raise ValueError(f"not a {kind} ID")
    return number


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError("on or off")
    return value == "on"


def _three_ways(value: str) -> bool | Literal["auto"]:
    if value not in ("on", "off", "auto"):
        raise ValueError("on, off or auto")
    return "auto" if value == "auto" else value == "on"


def _seconds(value: str) -> float:
    if not (value.isascii() and value.isdigit()):
        raise ValueError("a whole number of seconds")
    return float(value)


def _absolute(value: str) -> str:
    return os.path.abspath(value)  # before the daemon leaves for /


def _metrics(value: str) -> Metrics:
    path = value.removeprefix("unix:")
    if not path:
        raise ValueError("unix: is followed by a path")
    return Metrics(_absolute(path), path != value)


def _size(value: str) -> int:
    digits = value.rstrip("kKmMgG")
    suffix = value[len(digits) :].lower()
    if not (digits.isascii() and digits.isdigit()) or len(suffix) > 1:
        raise ValueError("a size is a number of bytes, or one with K, M or G")
    return int(digits) << {"": 0, "k": 10, "m": 20, "g": 30}[suffix]


def _format(value: str) -> str:
    known = ("qcow2", "raw", "vmdk")
    if value not in known:
        raise ValueError(f"known formats are {', '.join(known)}")
    return value


_FLAGS: Final[dict[str, tuple[str, bool]]] = {
    "ro": ("writable", False),
    "rw": ("writable", True),
    "allow_other": ("allow_other", True),
    "deny": ("deny", True),
    "direct_io": ("direct_io", True),
    "writeback": ("writeback", True),
}
_VALUES: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "uid": ("uid", _user),
    "gid": ("gid", _group),
    "mode": ("mode", _mode),
    "name": ("name", _file_name),
    "format": ("format", _format),
    "fsname": ("fsname", str),
    "snapshot": ("snapshot", str),
    "lock": ("lock", _three_ways),
    "confine": ("confine", _three_ways),
    "channel": ("channel", _switch),
    "awake": ("awake", _three_ways),
    "overlay": ("overlay", _absolute),
    "setuid": ("setuid", _user),
    "stop_timeout": ("stop_timeout", _seconds),
    "metrics": ("metrics", _metrics),
    "metadata_cache": ("metadata_bytes", _size),
    "inflate_cache": ("inflated_bytes", _size),
}
