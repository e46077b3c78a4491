"""How soon a worker stops computing for a client that has left.

    python bench/cancel.py --kind hf
    python bench/cancel.py --kind sglang

Starts one worker on the embedded model in float32 on the CPU and leaves requests while they wait
for a slot, while a picture of 40 megapixels is decoded, while a prompt of about 2000 tokens is
prefilled and while they decode. Measures the time from closing the connection until the worker
reports that the request neither waits nor runs: of the prefill and the decoding the engine has then
stopped, because the worker gives a slot back no earlier. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import httpx
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from transport.credentials import from_environment

ROOT = Path(__file__).resolve().parent.parent
SLOTS = 4
DECODE = {"messages": [{"role": "user", "content": "Count from 1 to 100."}]}
PREFILL = {"prompt": "word " * 800}  # 2.5 tokens each


def photo() -> str:
    """A JPEG of 40 megapixels in base64: half a second of decoding."""
    buffer = io.BytesIO()
    Image.effect_noise((800, 500), 60).resize((8000, 5000)).convert("RGB").save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def begin(address: str, fields: Mapping[str, object], *, first_token: bool) -> socket.socket:
    """The connection of a request that has been sent."""
    body = json.dumps(
        {"model": "pocket-llava", "temperature": 0, "max_new_tokens": 2000, **fields}
    ).encode()
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /worker_generate_stream HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n"
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(head.encode() + b"accept: text/event-stream\r\n\r\n" + body)
    if first_token:
        connection.recv(1)
    return connection


def leave(
    address: str,
    fields: Mapping[str, object],
    *,
    wait_s: float,
    first_token: bool = False,
    others: int = 0,
) -> float:
    """Milliseconds from closing the connection until the worker has no request but ``others``."""
    with httpx.Client(base_url=address, headers=from_environment()) as client:

        def requests() -> int:
            found: int = client.post("/worker_get_status").json()["queue_length"]
            return found

        with begin(address, fields, first_token=first_token):
            while requests() == others:
                time.sleep(0.001)
            time.sleep(wait_s)
            if requests() == others:
                raise SystemExit("error: the request ended before it was left")
        closed_at = time.perf_counter()
        while requests() > others:
            time.sleep(0.001)
    return (time.perf_counter() - closed_at) * 1000


def leave_waiting(address: str, *, wait_s: float) -> float:
    """The same for one that waits behind as many as there are slots."""
    with ExitStack() as stack:
        for _ in range(SLOTS):
            stack.enter_context(begin(address, DECODE, first_token=True))
        return leave(address, DECODE, wait_s=wait_s / 10, others=SLOTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kind", choices=["hf", "sglang"], required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--port", type=int, default=41101)
    args = parser.parse_args()
    flags = [
        "--limit-model-concurrency",
        str(SLOTS),
        "--no-register",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--log-level",
        "ERROR",
    ]
    command = [sys.executable, "-m", f"workers.{args.kind}", "--port", str(args.port), *flags]
    worker = subprocess.Popen(command, cwd=ROOT)
    address = f"http://127.0.0.1:{args.port}"
    source = random.Random(1)
    picture = {"prompt": "<image>", "images": [photo()]}
    found: dict[str, list[float]] = {"waiting": [], "picture": [], "prefill": [], "decode": []}
    try:
        while True:
            if worker.poll() is not None:
                raise SystemExit(f"error: the worker ended with {worker.returncode}")
            try:
                if httpx.get(f"{address}/healthz").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        for _ in track(range(args.rounds), description=f"leaving the {args.kind} worker"):
            wait_s = source.uniform(0, 0.05)
            found["decode"].append(leave(address, DECODE, first_token=True, wait_s=wait_s))
            found["prefill"].append(leave(address, PREFILL, wait_s=wait_s / 2))
            found["picture"].append(leave(address, picture, wait_s=wait_s))
            found["waiting"].append(leave_waiting(address, wait_s=wait_s))
            status = {"queue_length": 1}
            while status["queue_length"]:
                time.sleep(0.01)
                url = f"{address}/worker_get_status"
                status = httpx.post(url, headers=from_environment()).json()
    finally:
        worker.terminate()
        worker.wait()
    table = Table("phase", "median ms", "90 %", "worst", title=f"{args.kind}: idle after leaving")
    figures = {}
    for phase, times in found.items():
        times.sort()
        tenths = statistics.median(times), times[int(len(times) * 0.9)], times[-1]
        figures[phase] = dict(zip(("median_ms", "p90_ms", "worst_ms"), tenths, strict=True))
        table.add_row(phase, *(f"{value:.1f}" for value in tenths))
    Console().print(table)
    print(json.dumps({"kind": "cancel", "worker": args.kind, "rounds": args.rounds, **figures}))


if __name__ == "__main__":
    main()
