"""What a mount says of itself: `imagofs stat`, the extended attribute, the file of metrics."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagofs.fuse.statistics import Latencies
from tests.conftest import NewImage
from tests.mount.mounting import PROGRAM, MountImage, imagofs, mounting, wait_until


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MountImage]:
    with mounting(tmp_path) as mount_image:
        yield mount_image


def test_figures(new_image: NewImage, mount: MountImage) -> None:
    image = new_image("8M", "disk.qcow2")
    mounted = mount(image, "rw", "direct_io")
    with mounted.file.open("r+b", buffering=0) as file:
        for number in range(10):
            os.pwrite(file.fileno(), bytes([1]) * 65536, number * 65536)
        os.fsync(file)
        for number in range(100):
            os.pread(file.fileno(), 4096, number * 4096)
    found = json.loads(imagofs("stat", "--json", mounted.path).stdout)
    assert found["image"] == str(image) and found["format"] == "qcow2" and found["layers"] == 1
    assert found["writable"] is True and found["process"] == mounted.pid
    assert (found["reads"], found["read_bytes"]) == (100, 409600)
    assert (found["writes"], found["write_bytes"]) == (10, 655360)
    assert 0 < found["cached_reads"] <= 100 and 0 <= found["cached_writes"] <= 10
    assert found["size"] == 8 << 20 and found["allocated"] >= 655360
    assert found["clusters_allocated"] >= 10 and found["cluster_size"] == 65536
    assert found["queue_depth"] == 0 and found["queue_depth_max"] >= 1
    assert 0 < found["latency_p50"] <= found["latency_p99"] < 10
    assert 0 < found["uptime"] < 60
    as_attribute = json.loads(os.getxattr(mounted.path, "user.imagofs.stats"))
    assert as_attribute.keys() == found.keys()
    text = imagofs("stat", mounted.path).stdout
    assert "reads:       100, 400 KiB" in text and str(image) in text and "p99" in text


def test_without_the_channel(new_image: NewImage, mount: MountImage) -> None:
    mounted = mount(new_image("1M", "disk.qcow2"), "channel=off")
    found = json.loads(imagofs("stat", "--json", mounted.path).stdout)
    assert found["size"] == 1 << 20 and "reads" not in found
    assert "latency" not in imagofs("stat", mounted.path).stdout


def test_not_a_mount(tmp_path: Path) -> None:
    assert "mounted nothing here" in imagofs("stat", tmp_path, ok=1).stderr


def test_watch(new_image: NewImage, mount: MountImage) -> None:
    mounted = mount(new_image("1M", "disk.qcow2"), "direct_io")
    command = [str(PROGRAM), "stat", "--json", "--watch", "0.05", str(mounted.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        mounted.file.read_bytes()
        while json.loads(process.stdout.readline())["reads"] == first["reads"]:
            pass
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 0


def test_watch_on_a_terminal(new_image: NewImage, mount: MountImage) -> None:
    """It stays in its place, shows rates, and ends with an error when the mount does."""
    mounted = mount(new_image("1M", "disk.qcow2"))
    ours, theirs = pty.openpty()
    command = [str(PROGRAM), "stat", "--watch=0.05", str(mounted.path)]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        output = ""
        while not re.search(r"\x1b\[\d+A.*now \d+/s", output, re.DOTALL):
            output += os.read(ours, 4096).decode()
        mounted.umount()
        try:
            while os.read(ours, 4096):
                pass
        except OSError:  # the terminal's other end is closed
            pass
        os.close(ours)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 1 and "mounted nothing here" in stderr


def test_metrics(new_image: NewImage, mount: MountImage, tmp_path: Path) -> None:
    """Prometheus' text format: each metric has its type and its help, once."""
    metrics = tmp_path / "imagofs.prom"
    mounted = mount(new_image("1M", "disk.qcow2"), f"metrics={metrics}")
    wait_until(metrics.exists)
    lines = metrics.read_text().splitlines()
    assert len(lines) % 3 == 0 and len(lines) >= 30
    for purpose, kind, value in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name = kind.split()[2]
        assert purpose.startswith(f"# HELP {name} ") and kind.split()[3] in ("counter", "gauge")
        assert re.fullmatch(rf'{name}{{mountpoint="{mounted.path}"}} [0-9.e-]+', value)
        assert name.endswith("_total") == (kind.split()[3] == "counter")
    mounted.umount()
    assert not metrics.exists()


def test_metrics_that_cannot_be_written(
    new_image: NewImage, mount: MountImage, tmp_path: Path
) -> None:
    mounted = mount(new_image("1M", "disk.qcow2"), f"metrics={tmp_path}/missing/file")
    assert mounted.file.read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize("seed", range(5))
def test_quantiles(seed: int) -> None:
    """Never below the true one, and less than a quarter above it."""
    source = random.Random(seed)
    times = sorted(round(10 ** source.uniform(0, 11)) for _ in range(2000))
    latencies = Latencies()
    for time in times:
        latencies.add(time, 3)
    assert latencies.total == 6000
    for fraction in (0.01, 0.5, 0.99, 1.0):
        true = times[max(round(fraction * 2000) - 1, 0)] / 1e9
        assert true <= latencies.quantile(fraction) <= true * 1.26 + 1e-9
    assert Latencies().quantile(0.5) == 0.0
