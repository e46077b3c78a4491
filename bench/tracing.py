"""What traces cost: CPU time of a controller and of an echo worker per request, off and on.

    python -m bench.tracing --rounds 5 --requests 1000 --tokens 16
    python -m bench.tracing --checkout ../before      as a third: another checkout, traces off

Each variant has a controller and a worker of its own; a round asks each of them in turn. ``on``
sends its spans to a collector in this process. CPU time is the kernel's count of each process, so
that what else runs on the machine matters little. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil

from transport.process import free_port

ROOT = Path(__file__).resolve().parent.parent


class Sink(BaseHTTPRequestHandler):
    """A collector that takes everything and keeps nothing but the count of its bytes."""

    received_bytes = 0

    def do_POST(self) -> None:
        Sink.received_bytes += len(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Variant:
    """One controller with one worker, and what they took in each round."""

    name: str
    address: str
    controller: psutil.Process
    worker: psutil.Process
    controller_us: list[float] = field(default_factory=list)
    worker_us: list[float] = field(default_factory=list)


def start(stack: ExitStack, cwd: Path, module: str, port: int, *flags: str) -> psutil.Process:
    command = [sys.executable, "-m", module, "--log-level", "ERROR", "--port", str(port), *flags]
    popen = subprocess.Popen(command, cwd=cwd, env={**os.environ, "NO_PROXY": "127.0.0.1"})
    stack.callback(popen.wait)
    stack.callback(popen.terminate)
    return psutil.Process(popen.pid)


def variant(stack: ExitStack, name: str, cwd: Path, *flags: str) -> Variant:
    port, worker_port = free_port(), free_port()
    address = f"http://127.0.0.1:{port}"
    controller = start(stack, cwd, "controller", port, *flags)
    to = ("--controller-address", address)
    worker = start(stack, cwd, "workers.echo", worker_port, *to, *flags)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            workers = httpx.get(f"{address}/cluster", trust_env=False).json()["workers"]
            if any(w["state"] == "ready" for w in workers):
                return Variant(name, address, controller, worker)
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"error: {name} is not ready after 60 s")


async def ask(address: str, requests: int, tokens: int, streams: int) -> None:
    """``requests`` requests of ``tokens`` tokens each, ``streams`` at a time."""
    body = {"model": "echo", "prompt": "x" * (tokens - 1), "max_new_tokens": tokens}
    left = iter(range(requests))
    headers = {"accept": "text/event-stream"}

    async def one(client: httpx.AsyncClient) -> None:
        for _ in left:
            answer = await client.post("/worker_generate_stream", json=body, headers=headers)
            answer.raise_for_status()

    async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
        await asyncio.gather(*(one(client) for _ in range(streams)))


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(v: Variant, requests: int, tokens: int, streams: int) -> None:
    before = cpu_s(v.controller), cpu_s(v.worker)
    asyncio.run(ask(v.address, requests, tokens, streams))
    time.sleep(5.5)  # a batch of spans leaves every five seconds: it belongs to these requests
    v.controller_us.append((cpu_s(v.controller) - before[0]) / requests * 1e6)
    v.worker_us.append((cpu_s(v.worker) - before[1]) / requests * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--checkout", type=Path, help="another checkout to compare with")
    args = parser.parse_args()
    sink = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    collector = f"http://127.0.0.1:{sink.server_address[1]}"
    with ExitStack() as stack:
        variants = [variant(stack, "off", ROOT)]
        variants.append(variant(stack, "on", ROOT, "--otlp-endpoint", collector))
        if args.checkout:
            variants.append(variant(stack, "before", args.checkout.resolve()))
        for v in variants:
            asyncio.run(ask(v.address, 200, args.tokens, args.streams))  # warm
        for _ in range(args.rounds):
            for v in variants:
                measure(v, args.requests, args.tokens, args.streams)
    figures = {}
    print(f"{'':8} {'controller':>22} {'worker':>22}   microseconds of CPU a request (min..max)")
    for v in variants:
        line = f"{v.name:8}"
        for part, values in (("controller", v.controller_us), ("worker", v.worker_us)):
            median = statistics.median(values)
            figures[f"{v.name}_{part}_us"] = round(median, 1)
            line += f" {median:9.0f} ({min(values):.0f}..{max(values):.0f})".rjust(23)
        print(line)
    figures["span_bytes"] = Sink.received_bytes
    print(json.dumps({"kind": "tracing", **vars(args) | {"checkout": None}, **figures}))


if __name__ == "__main__":
    main()
