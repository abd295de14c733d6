"""What a mount says of itself: `imagofs stat`, the extended attribute, the file of metrics."""

from __future__ import annotations

import http.client
import json
import os
import pty
import random
import re
import signal
import socket
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


def test_watch_before_the_mountpoint(new_image: NewImage, mount: MountImage) -> None:
    """The seconds may be left out there too: argparse would take the mountpoint for them."""
    mounted = mount(new_image("1M", "disk.qcow2"))
    command = [str(PROGRAM), "stat", "--json", "--watch", str(mounted.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["mountpoint"] == str(mounted.path)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 0


@pytest.mark.parametrize("seconds", ["0", "nan", "soon", "1e9"])
def test_watch_for_no_time(seconds: str, tmp_path: Path) -> None:
    stderr = imagofs("stat", f"--watch={seconds}", tmp_path, ok=2).stderr
    assert f"{seconds} is not a number of seconds from 0.05 to 86400" in stderr


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
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "imagofs.prom.new").symlink_to("precious")
    mounted = mount(new_image("1M", "disk.qcow2"), f"metrics={metrics}", "confine=off")
    wait_until(metrics.exists)
    lines = metrics.read_text().splitlines()
    assert len(lines) % 3 == 0 and len(lines) >= 30
    for purpose, kind, value in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        name = kind.split()[2]
        assert purpose.startswith(f"# HELP {name} ") and kind.split()[3] in ("counter", "gauge")
        assert re.fullmatch(rf'{name}{{mountpoint="{mounted.path}"}} [0-9.e-]+', value)
        assert name.endswith("_total") == (kind.split()[3] == "counter")
    mounted.umount()
    assert not metrics.exists() and (tmp_path / "precious").read_text() == "precious"


def ask(path: Path, request: bytes, *, close: bool = True) -> bytes:
    """What a client gets that sends `request`."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(request)
        if close:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
        return answer


def test_metrics_on_a_socket(new_image: NewImage, mount: MountImage, tmp_path: Path) -> None:
    path = tmp_path / "metrics socket"
    mounted = mount(new_image("1M", "disk.qcow2"), f"metrics=unix:{path}")
    assert path.is_socket() and path.stat().st_mode & 0o777 == 0o600
    connection = http.client.HTTPConnection("localhost")
    with socket.socket(socket.AF_UNIX) as connection.sock:
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        first = connection.getresponse().read().decode()
    assert 'imagofs_reads_total{mountpoint="' in first
    mounted.file.read_bytes()
    # Whoever is silent gets it too; a browser's head and a wrong method get what HTTP says.
    for plain in (ask(path, b""), ask(path, b"", close=False)):
        assert plain.startswith(b"# HELP imagofs_") and plain.endswith(b"\n")
        assert b"imagofs_reads_total" in plain and plain != first.encode()
    head, _, body = ask(path, b"GET / HTTP/1.0\r\n\r\n", close=False).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"version=0.0.4" in head
    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert ask(path, b"HEAD / HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
    assert ask(path, b"POST / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")
    # One that hangs up, and one that says nothing for a while, are in nobody's way.
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as rude:
        for client in (silent, rude):
            client.connect(str(path))
        rude.close()
        assert ask(path, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")
        mounted.umount()
    assert not path.exists()


def test_the_socket_of_another(new_image: NewImage, mount: MountImage, tmp_path: Path) -> None:
    """A dead one is replaced; one that lives, and any other file, stays as it is."""
    path = tmp_path / "socket"
    first = mount(new_image("1M"), f"metrics=unix:{path}")
    second = mount(new_image("1M"), f"metrics=unix:{path}")
    second.umount()
    assert str(first.path).encode() in ask(path, b"")
    first.umount()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    third = mount(new_image("1M"), f"metrics=unix:{path}")
    assert str(third.path).encode() in ask(path, b"")
    third.signal(signal.SIGKILL)
    wait_until(lambda: not path.exists())  # even then
    path.write_text("precious")
    mount(new_image("1M"), f"metrics=unix:{path}").umount()
    assert path.read_text() == "precious"


def test_metrics_that_cannot_be_written(
    new_image: NewImage, mount: MountImage, tmp_path: Path
) -> None:
    for prefix in ("", "unix:"):
        mounted = mount(new_image("1M"), f"metrics={prefix}{tmp_path}/missing/file")
        assert mounted.file.read_bytes() == bytes(1 << 20)
        mounted.umount()
        # The daemon would wait for itself.
        inside = f"metrics={prefix}{mounted.path}/file"
        stderr = imagofs(new_image("1M"), mounted.path, "-o", inside, ok=1).stderr
        assert "inside the mountpoint" in stderr


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
