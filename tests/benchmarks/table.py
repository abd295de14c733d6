"""Turn pytest-benchmark's JSON into a Markdown table on standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    report = json.loads(Path(sys.argv[1]).read_text())
    machine = report["machine_info"]
    print(f"Measured {report['datetime'][:10]}, Python {machine['python_version']}, ", end="")
    print(f"{machine['cpu'].get('brand_raw', machine['machine'])}.\n")
    print("| benchmark | median | calls a second |\n|---|---:|---:|")
    for entry in sorted(report["benchmarks"], key=lambda entry: entry["fullname"]):
        median = entry["stats"]["median"]
        name = entry["fullname"].split("benchmarks/")[-1].removeprefix("bench_")
        print(f"| {name} | {median * 1e6:,.1f} µs | {1 / median:,.0f} |")


if __name__ == "__main__":
    main()
