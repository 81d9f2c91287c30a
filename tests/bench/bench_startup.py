"""How long one waits for saehook: import, `--help`, the page, the evaluation of `demo --no-serve`; each in a fresh process.

    python tests/bench/bench_startup.py [--json out.json] [--repeats 5]

The page is there when it answers a request; it and the evaluation are taken once. Files are in the system's cache, as on any
second start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

LIMITS = {"import saehook": 0.5, "saehook --help": 0.5, "saehook demo, page": 15.0, "saehook demo --no-serve": 60.0}
"""Seconds that issue 8 allows."""


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def page() -> float:
    """Until `saehook demo` answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    command = [sys.executable, "-m", "saehook", "demo", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        while process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                    assert answer.status == 200
                return time.perf_counter() - start
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"`saehook demo` ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def measure(repeats: int) -> dict[str, Any]:
    """Seconds by what; the median, where it is taken several times."""

    def median(*arguments: str) -> float:
        return statistics.median(seconds(*arguments) for _ in range(repeats))

    seconds("-c", "import saehook")  # writes the bytecode
    seconds("-m", "saehook", "--help")
    return {
        "python -c pass": median("-c", "pass"),
        "import saehook": median("-c", "import saehook"),
        "saehook --help": median("-m", "saehook", "--help"),
        "saehook demo, page": page(),
        "saehook demo --no-serve": seconds("-m", "saehook", "demo", "--no-serve"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    found = measure(arguments.repeats)
    for what, taken in found.items():
        print(f"{what:26} {taken:6.2f} s", f"(at most {LIMITS[what]:g})" if what in LIMITS else "")
    machine = {"python": platform.python_version(), "processor": platform.machine(), "cores": os.cpu_count()}
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": found, "limits": LIMITS, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
