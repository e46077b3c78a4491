"""How long a killed controller is without its workers once it is back.

    python bench/restart.py --rounds 10

Kills the controller with SIGKILL, starts it again on its port, and measures the time from its
first healthy answer until every echo worker is ready there again. Heartbeats are 30 s apart, so
what is measured is how soon workers notice the broken connection. Prints a line, then JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
from rich.progress import track

from transport.credentials import from_environment

ROOT = Path(__file__).resolve().parent.parent


def start(module: str, *args: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, "--log-level", "ERROR", *args]
    return subprocess.Popen(command, cwd=ROOT)


def wait_for(condition: object, timeout_s: float = 30) -> float:
    """Seconds until ``condition()`` is true."""
    assert callable(condition)
    begun = time.monotonic()
    while time.monotonic() - begun < timeout_s:
        try:
            if condition():
                return time.monotonic() - begun
        except httpx.HTTPError:
            pass
        time.sleep(0.005)
    raise SystemExit("error: the cluster is not whole again after 30 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--port", type=int, default=21101)
    args = parser.parse_args()
    address = f"http://127.0.0.1:{args.port}"
    client = httpx.Client(base_url=address, timeout=2, headers=from_environment())

    def healthy() -> bool:
        return client.get("/healthz").status_code == 200

    def whole() -> bool:
        workers = client.get("/cluster").json()["workers"]
        return bool(sum(worker["state"] == "ready" for worker in workers) == args.workers)

    times: list[float] = []
    with ExitStack() as stack:
        controller = start("controller", "--port", str(args.port))
        for _ in range(args.workers):
            worker = start("workers.echo", "--port", "0", "--controller-address", address)
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
        try:
            wait_for(whole)
            for _ in track(range(args.rounds), description="killing the controller"):
                controller.kill()
                controller.wait()
                controller = start("controller", "--port", str(args.port))
                wait_for(healthy)
                times.append(wait_for(whole))
        finally:
            controller.terminate()
            controller.wait()
    median_s, worst_s = statistics.median(times), max(times)
    print(f"whole again after {median_s:.2f} s (median), {worst_s:.2f} s (worst of {len(times)})")
    print(json.dumps({"kind": "restart", "median_s": median_s, "worst_s": worst_s, "all_s": times}))


if __name__ == "__main__":
    main()
