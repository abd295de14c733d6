"""What a mount counts, and how it is shown: one line, JSON, or Prometheus' text format.

Only what passes the data channel is counted; without it (`channel=off`) there are no requests in
the figures. Latency is from the moment that a request was read until it was answered. Of the
requests that are answered at once, one in `SAMPLE_EVERY` is timed, and counts for all of them.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

import trio

if TYPE_CHECKING:
    from .session import Session

__all__ = ["SAMPLE_EVERY", "Latencies", "metrics", "one_line", "snapshot"]

SAMPLE_EVERY: Final = 32
_SUB_BITS = 2
_PREFIX = "imagofs_"


class Latencies:
    """A histogram of times, each bucket a quarter of a power of two wide."""

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = [0] * (64 << _SUB_BITS)
        #: How many there are.
        self.total = 0

    def add(self, nanoseconds: int, weight: int = 1) -> None:
        """Count a time, `weight` times."""
        shift = max(nanoseconds.bit_length() - _SUB_BITS - 1, 0)
        self._counts[(shift << _SUB_BITS) + (nanoseconds >> shift)] += weight
        self.total += weight

    def quantile(self, fraction: float) -> float:
        """Seconds that this part of all requests did not exceed, at most a quarter too many."""
        wanted = self.total * fraction
        seen = 0
        for index, number in enumerate(self._counts):
            seen += number
            if number and seen >= wanted:
                shift = max((index >> _SUB_BITS) - 1, 0)
                return ((index - (shift << _SUB_BITS) + 1) << shift) / 1e9
        return 0.0


def snapshot(session: Session) -> dict[str, Any]:
    """The figures of a mount, as the extended attribute `user.imagofs.stats` has them in JSON.

    Called in trio's thread. Sizes are in bytes, times in seconds, counts since the mount began.
    """
    disk = session.disk
    access = disk.access
    allocated = access.allocated_bytes()
    figures: dict[str, Any] = {
        "image": access.filename,
        "format": access.format_name,
        "layers": len(access.layers()),
        "mountpoint": session.options.point,
        "writable": disk.writable,
        "process": os.getpid(),
        "uptime": round(time.monotonic() - session.started, 3),
        "size": disk.size,
        "allocated": allocated,
        "allocated_since_mount": allocated - session.allocated_at_start,
    }
    if access.format_name == "qcow2":
        # Subclusters, where the image has them.
        figures["cluster_size"] = access.driver.granularity
        figures["clusters_allocated"] = max(allocated - session.allocated_at_start, 0) // (
            access.driver.granularity
        )
    if (channel := session.channel) is not None:
        counted = channel.statistics
        latencies = counted.latencies
        figures |= {
            "reads": counted.reads,
            "read_bytes": counted.read_bytes,
            "cached_reads": counted.reads - counted.slow_reads,
            "writes": counted.writes,
            "write_bytes": counted.write_bytes,
            "cached_writes": counted.writes - counted.slow_writes,
            "other_requests": counted.others + counted.forwarded,
            "queue_depth": channel.queue_depth,
            "queue_depth_max": counted.deepest,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "latency_p50": latencies.quantile(0.5),
            "latency_p99": latencies.quantile(0.99),
            "awake_seconds": round(channel.awake_seconds, 3),
        }
    return figures


def one_line(figures: dict[str, Any]) -> str:
    """The figures that matter most, for a log or a unit's status."""
    if "reads" not in figures:
        return "requests are not counted without the data channel"
    return (
        f"{figures['reads']} reads of {figures['read_bytes'] >> 20} MiB, "
        f"{figures['writes']} writes of {figures['write_bytes'] >> 20} MiB, "
        f"{figures['queue_depth']} waiting, "
        f"latency p50 {figures['latency_p50'] * 1e6:.0f} us, "
        f"p99 {figures['latency_p99'] * 1e6:.0f} us, up {figures['uptime']:.0f} s"
    )


#: Figure to (Prometheus' type, what it is).
_METRICS: Final = {
    "uptime": ("gauge", "Seconds since the mount began."),
    "size": ("gauge", "Size of the disk in bytes."),
    "allocated": ("gauge", "Bytes that the top image takes on the host."),
    "reads": ("counter", "Reads that were answered."),
    "read_bytes": ("counter", "Bytes of them."),
    "cached_reads": ("counter", "Reads that were answered without waiting for the image."),
    "writes": ("counter", "Writes that were answered."),
    "write_bytes": ("counter", "Bytes of them."),
    "cached_writes": ("counter", "Writes that were answered without waiting for the image."),
    "other_requests": ("counter", "Other requests that were answered."),
    "queue_depth": ("gauge", "Requests that wait for the image now."),
    "queue_depth_max": ("gauge", "The most that ever waited."),
    "tasks": ("gauge", "Tasks of the daemon, those of requests that wait included."),
    "latency_p50": ("gauge", "Seconds that half of the requests did not exceed."),
    "latency_p99": ("gauge", "Seconds that 99 of 100 requests did not exceed."),
    "awake_seconds": ("counter", "Seconds for which idle processors were kept from sleeping."),
}


def metrics(figures: dict[str, Any]) -> str:
    """The figures in Prometheus' text format."""
    point = figures["mountpoint"].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines = []
    for name, (kind, purpose) in _METRICS.items():
        if name in figures:
            full = _PREFIX + name + ("_total" if kind == "counter" else "")
            lines += [
                f"# HELP {full} {purpose}",
                f"# TYPE {full} {kind}",
                f'{full}{{mountpoint="{point}"}} {figures[name]}',
            ]
    return "\n".join(lines) + "\n"
