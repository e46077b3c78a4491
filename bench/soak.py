"""Soak test: many concurrent streams through a controller and echo workers, every reply verified.

    python bench/soak.py --streams 1000 --requests 100000 --out bench/results/soak.json

It starts its own controller and echo workers as real processes on free ports, keeps ``--streams``
connections busy from ``--clients`` processes until ``--requests`` requests have been made, and
checks each reply byte for byte against what an echo must be, in all three dialects (our SSE,
OpenAI's and LLaVA's). ``--leave`` of the clients go away at a random moment; ``--bad`` of the
requests are wrong and must be refused in the right way. The client shares no code with what it
tests.

    ok          the whole echo, in order, one terminal event, nothing after it
    left        the client went away on purpose
    bad_ok      a wrong request, refused with the right status and a typed error
    refused     a good request refused (429 or 503)
    lost        no reply                      cut         a reply without its terminal event
    failed      a typed failure in the stream duplicated  a second terminal event, or more after it
    wrong       any other difference          timeout     nothing complete within --timeout-s

At the end nothing may be in flight or waiting anywhere; memory (RSS) is sampled all the time.
Prints a table, then one JSON line last. Ctrl-C keeps what was measured. Exit code: 0 when every
reply was as it must be and all slots came back, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

OUTCOMES = (
    *("ok", "left", "bad_ok", "refused"),
    *("lost", "cut", "failed", "duplicated", "wrong", "timeout"),
)
GOOD = ("ok", "left", "bad_ok")

_END = 256  # the echo engine's end-of-sequence token
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_LETTERS = 'abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ 0123456789 .,;:!?"\\\n éßñ €漢字 🚲'


# ---------------------------------------------------------------- requests and what must come back


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as bytes, and the check of its reply."""

    request: bytes
    check: Callable[[int, bytes], str]  # status, body -> outcome


def _post(path: str, body: bytes, accept: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
        f"accept: {accept}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def good_exchange(rng: random.Random, min_tokens: int, max_tokens: int) -> Exchange:
    """A random text to be echoed, in one of the three dialects."""
    size = rng.randint(min_tokens, max_tokens) - 1  # bytes; the end token is one more
    text = "".join(rng.choices(_LETTERS, k=size)).encode()[:size].decode("utf-8", "ignore")
    dialect = rng.random()
    if dialect < 0.1:
        fields: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "stream": True}
        path, accept, check = "/v1/chat/completions", "*/*", _check_openai
    else:
        fields = {"prompt": text, "max_new_tokens": max_tokens + 8}
        path = "/worker_generate_stream"
        llava = dialect < 0.2
        accept, check = ("*/*", _check_llava) if llava else ("text/event-stream", _check_sse)
    body = json.dumps({"model": "echo", **fields}).encode()
    return Exchange(_post(path, body, accept), lambda status, data: check(status, data, text))


def bad_exchange(rng: random.Random) -> Exchange:
    """A request that must be refused."""
    body, status = rng.choice(
        (
            (b'{"model": "echo", "prompt": "a', 422),
            (b"[1, 2]", 422),
            (b'{"model": "echo"}', 422),
            (b'{"model": "echo", "prompt": "a <image>"}', 422),
            (b'{"model": "no-such-model", "prompt": "a"}', 404),
            (b'{"model": "echo", "prompt": "%b"}' % (b"a" * 9000), 413),
        )
    )
    request = _post("/worker_generate_stream", body, "text/event-stream")
    return Exchange(request, lambda got, data: _check_refusal(got, data, status))


def _check_refusal(status: int, body: bytes, expected: int) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return "wrong"
    return "bad_ok" if status == expected and error["code"] and error["message"] else "wrong"


def _check_status(status: int) -> str | None:
    if status in (429, 503):
        return "refused"
    return None if status == 200 else "wrong"


def _check_sse(status: int, body: bytes, text: str) -> str:
    if refused := _check_status(status):
        return refused
    answer, ids, terminal = "", list[int](), None
    for frame in body.decode().split("\n\n")[:-1]:
        if terminal is not None:
            return "duplicated"
        name, _, data = frame.partition("\ndata: ")
        event = json.loads(data)
        if name != f"event: {event['type']}":
            return "wrong"
        if event["type"] == "delta":
            answer += event["text"]
            ids += event["token_ids"]
        else:
            terminal = event
    if terminal is None or not body.endswith(b"\n\n"):
        return "cut"
    if terminal["type"] == "failed":
        return "failed"
    expected = [*text.encode(), _END]
    whole = answer == text and ids == expected and terminal["reason"] == "stop"
    return "ok" if whole and terminal["completion_tokens"] == len(expected) else "wrong"


def _check_openai(status: int, body: bytes, text: str) -> str:
    if refused := _check_status(status):
        return refused
    *frames, rest = body.decode().split("\n\n")
    answer, reasons, done = "", [], False
    for frame in frames:
        if done:
            return "duplicated"
        data = frame.removeprefix("data: ")
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            return "failed"
        choice = chunk["choices"][0]
        answer += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons.append(choice["finish_reason"])
    if not done or not reasons or rest:
        return "cut"
    if len(reasons) > 1:
        return "duplicated"
    return "ok" if answer == text and reasons == ["stop"] else "wrong"


def _check_llava(status: int, body: bytes, text: str) -> str:
    if refused := _check_status(status):
        return refused
    *frames, rest = body.split(b"\0")
    so_far, finished = text, False  # LLaVA's frames repeat the prompt
    for frame in frames:
        if finished:
            return "duplicated"
        fields = json.loads(frame)
        if fields["error_code"]:
            return "failed"
        if not fields["text"].startswith(so_far):
            return "wrong"
        so_far = fields["text"]
        finished = fields["finish_reason"] is not None
    if not finished or rest:
        return "cut"
    return "ok" if so_far == text * 2 and fields["finish_reason"] == "stop" else "wrong"


# ---------------------------------------------------------------- the client


class Reply(asyncio.Protocol):
    """One connection: sends a request, gathers the whole response, decodes it once at its end."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ended: asyncio.Future[None] | None = None
        self.first_at: float | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is none by inheritance

    async def fetch(self, request: bytes) -> None:
        """Send, and return when the response is complete or the connection has ended."""
        assert self.transport is not None
        self._buffer.clear()
        self.first_at = None
        self._ended = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._ended

    def data_received(self, data: bytes) -> None:
        if self.first_at is None:
            self.first_at = time.monotonic()
        self._buffer += data
        if self.complete:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    @property
    def complete(self) -> bool:
        if self._buffer.endswith(_LAST_CHUNK):
            return True
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        name = b"\r\ncontent-length: "
        if not found or name not in head.lower():
            return False
        return len(body) >= int(head.lower().split(name)[1].split(b"\r\n")[0])

    @property
    def silent(self) -> bool:
        return not self._buffer

    def decoded(self) -> tuple[int, bytes]:
        """Status and body."""
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" not in head.lower():
            return status, rest
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return status, body


@dataclass(frozen=True, slots=True)
class Plan:
    """What one client process does."""

    address: str
    streams: int
    requests: int
    leave: float
    bad: float
    min_tokens: int
    max_tokens: int
    timeout_s: float
    seed: int


@dataclass(slots=True)
class Tally:
    """What one client process has seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    duration_s: list[float] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


class Client:
    """``plan.streams`` connections that share ``plan.requests`` requests."""

    def __init__(self, plan: Plan, stop: Event) -> None:
        self._plan = plan
        self._stop = stop
        self._rng = random.Random(plan.seed)
        self._left = plan.requests
        self._where = urlsplit(plan.address)
        self.tally = Tally()

    async def run(self, tell: Callable[[Counter[str]], None]) -> None:
        streams = [asyncio.create_task(self._stream()) for _ in range(self._plan.streams)]
        everything = asyncio.gather(*streams)
        while not everything.done():
            await asyncio.wait([everything], timeout=0.5)
            tell(self.tally.outcomes)
            if self._stop.is_set():
                self._left = 0
        everything.result()

    async def _stream(self) -> None:
        reply: Reply | None = None
        await asyncio.sleep(self._rng.random())  # not all in the same instant
        while self._left > 0:
            self._left -= 1
            if reply is None or reply.transport is None or reply.transport.is_closing():
                try:
                    reply = await self._connect()
                except OSError as exc:
                    self._note("lost", f"connect: {exc}")
                    continue
            if not await self._request(reply):
                reply = None
        if reply is not None and reply.transport is not None:
            reply.transport.close()

    async def _connect(self) -> Reply:
        loop = asyncio.get_running_loop()
        where = self._where
        _, reply = await loop.create_connection(Reply, where.hostname or "", where.port or 80)
        return reply

    async def _request(self, reply: Reply) -> bool:
        """One exchange; whether the connection can be used again."""
        plan, rng = self._plan, self._rng
        bad = rng.random() < plan.bad
        leaves = not bad and rng.random() < plan.leave
        exchange = (
            bad_exchange(rng) if bad else good_exchange(rng, plan.min_tokens, plan.max_tokens)
        )
        begun_at = time.monotonic()
        # Who leaves does so at a random moment of a typical answer's life, or before it begins.
        typical_s = self.tally.duration_s[-1] if self.tally.duration_s else 0.5
        limit_s = rng.uniform(0, typical_s) if leaves else plan.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await reply.fetch(exchange.request)
        except TimeoutError:
            assert reply.transport is not None
            reply.transport.abort()
            self._note("left" if leaves else "timeout", "")
            return False
        outcome, detail = self._judge(reply, exchange)
        self._note(outcome, detail)
        if outcome == "ok" and reply.first_at is not None:
            self.tally.ttft_s.append(reply.first_at - begun_at)
            self.tally.duration_s.append(time.monotonic() - begun_at)
        return outcome in ("ok", "bad_ok", "refused")

    def _judge(self, reply: Reply, exchange: Exchange) -> tuple[str, str]:
        if reply.silent:
            return "lost", "the connection ended without a reply"
        if not reply.complete:
            return "cut", bytes(reply._buffer[-200:]).decode(errors="replace")
        try:
            status, body = reply.decoded()
            outcome = exchange.check(status, body)
        except (ValueError, LookupError, TypeError) as exc:
            return "wrong", f"{type(exc).__name__}: {exc}"
        return outcome, f"{status} {body[-200:].decode(errors='replace')}"

    def _note(self, outcome: str, detail: str) -> None:
        self.tally.outcomes[outcome] += 1
        if outcome not in GOOD and len(self.tally.examples) < 5:
            self.tally.examples.append(f"{outcome}: {detail}")


def client_main(plan: Plan, pipe: Connection, stop: Event) -> None:
    """A client process; the parent decides when Ctrl-C means stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    client = Client(plan, stop)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(client.run(lambda outcomes: pipe.send(dict(outcomes))))
    pipe.send(client.tally)
    pipe.close()


# ---------------------------------------------------------------- the cluster under test


@contextmanager
def started(log: Path, module: str, *args: str) -> Iterator[tuple[psutil.Process, str]]:
    """``python -m module`` as a process of its own, and the address it listens on."""
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, "--log-json", *args],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us
        )
    try:
        yield psutil.Process(popen.pid), _address(popen, log)
    finally:
        popen.terminate()
        try:
            popen.wait(15)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def _address(popen: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and popen.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == "listening":
                    return str(entry["address"])
        time.sleep(0.05)
    raise SystemExit(f"a process did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _wait_ready(controller: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = httpx.get(f"{controller}/cluster", timeout=10).json()["workers"]
        if sum(worker["state"] == "ready" for worker in workers) == count:
            return
        time.sleep(0.1)
    raise SystemExit(f"not {count} ready workers within 60 s")


def _leftovers(controller: str, workers: Sequence[str]) -> dict[str, int]:
    """What is still in flight or waiting; all 0 is how it must end."""
    load = httpx.get(f"{controller}/cluster", timeout=10).json()["load"]
    left = {"inflight": load["inflight"], "waiting": load["waiting"]}
    statuses = [httpx.post(f"{w}/worker_get_status", timeout=10).json() for w in workers]
    left["workers_running"] = sum(status["running"] for status in statuses)
    left["workers_waiting"] = sum(status["waiting"] for status in statuses)
    return left


def _outcome_counters(controller: str) -> dict[str, int]:
    """How the controller itself says its requests ended."""
    prefix = 'tandem_requests_total{outcome="'
    lines = httpx.get(f"{controller}/metrics", timeout=10).text.splitlines()
    pairs = (line.removeprefix(prefix).split('"} ') for line in lines if line.startswith(prefix))
    return {outcome: int(float(count)) for outcome, count in pairs}


# ---------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory and descriptors after ``done`` requests."""

    at_s: float
    done: int
    rss_bytes: dict[str, int]
    fds: dict[str, int]


def _sample(processes: dict[str, psutil.Process], at_s: float, done: int) -> Sample:
    rss = {name: process.memory_info().rss for name, process in processes.items()}
    fds = {name: process.num_fds() for name, process in processes.items()}
    return Sample(at_s, done, rss, fds)


def _memory(samples: Sequence[Sample], name: str) -> dict[str, float]:
    """RSS in MB after a tenth, a half and all of the requests, and its slope after the first
    tenth, when everything has been used once."""
    total = samples[-1].done

    def after(share: float) -> float:
        at = next(s for s in samples if s.done >= share * total)
        return round(at.rss_bytes[name] / 1e6, 1)

    points = [(s.done, s.rss_bytes[name] / 1e6) for s in samples if s.done >= 0.1 * total]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return {
        "rss_mb_at_10": after(0.1),
        "rss_mb_at_50": after(0.5),
        "rss_mb_at_100": after(1.0),
        "slope_mb_per_100k_requests": round(slope * 1e5, 2),
    }


# ---------------------------------------------------------------- the run


def run_clients(
    args: argparse.Namespace, address: str, processes: dict[str, psutil.Process]
) -> tuple[Tally, list[Sample], float, bool]:
    """All client processes to their end, or to Ctrl-C."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pipes: dict[Connection, dict[str, int]] = {}
    clients = []
    for index in range(args.clients):
        plan = Plan(
            address,
            _share(args.streams, args.clients, index),
            _share(args.requests, args.clients, index),
            *(args.leave, args.bad, args.min_tokens, args.max_tokens, args.timeout_s),
            args.seed + index,
        )
        ours, theirs = context.Pipe(duplex=False)
        client = context.Process(target=client_main, args=(plan, theirs, stop), daemon=True)
        client.start()
        theirs.close()
        pipes[ours] = {}
        clients.append(client)
    tally, interrupted, done = Tally(), False, 0
    begun_at = time.monotonic()
    samples = [_sample(processes, 0.0, 0)]
    open_pipes = set(pipes)
    with _progress() as progress:
        bar = progress.add_task("soak", total=args.requests, note="")
        while open_pipes:
            try:
                for pipe in wait(list(open_pipes), timeout=1.0):
                    assert isinstance(pipe, Connection)
                    try:
                        news = pipe.recv()
                    except EOFError:
                        open_pipes.discard(pipe)
                        continue
                    if isinstance(news, Tally):
                        tally.outcomes += news.outcomes
                        tally.ttft_s += news.ttft_s
                        tally.duration_s += news.duration_s
                        tally.examples += news.examples
                        pipes[pipe] = dict(news.outcomes)
                    else:
                        pipes[pipe] = news
                done = sum(sum(outcomes.values()) for outcomes in pipes.values())
                faults = done - sum(o.get(name, 0) for o in pipes.values() for name in GOOD)
                progress.update(bar, completed=done, note=f"{faults} faults")
                now_s = time.monotonic() - begun_at
                if done > samples[-1].done and now_s - samples[-1].at_s >= 0.5:
                    samples.append(_sample(processes, now_s, done))
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                stop.set()
                progress.update(bar, description="stopping")
    wall_s = time.monotonic() - begun_at
    samples.append(_sample(processes, wall_s, done))
    for client in clients:
        client.join(10)
    return tally, samples, wall_s, interrupted


def _share(total: int, parts: int, index: int) -> int:
    return total // parts + (index < total % parts)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)

    def at(share: float) -> float | None:
        return round(ordered[int(share * (len(ordered) - 1))], 4) if ordered else None

    return {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)}


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Start the cluster, drive it, and report."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        process, controller = stack.enter_context(
            started(folder / "controller.log", "controller", "--port", "0")
        )
        processes, workers = {"controller": process}, []
        for index in range(args.workers):
            process, address = stack.enter_context(
                started(
                    *(folder / f"worker-{index}.log", "workers.echo", "--port", "0"),
                    *("--controller-address", controller, "--delay-s", str(args.token_delay_s)),
                    *("--limit-model-concurrency", str(args.worker_capacity)),
                )
            )
            processes[f"worker-{index}"] = process
            workers.append(address)
        _wait_ready(controller, args.workers)
        cpu_before = {name: sum(p.cpu_times()[:2]) for name, p in processes.items()}
        tally, samples, wall_s, interrupted = run_clients(args, controller, processes)
        cpu = {n: sum(p.cpu_times()[:2]) - cpu_before[n] for n, p in processes.items()}
        deadline = time.monotonic() + 10
        while any((left := _leftovers(controller, workers)).values()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        drained_fds = {name: process.num_fds() for name, process in processes.items()}
        counters = _outcome_counters(controller)
    made = sum(tally.outcomes.values())
    return {
        "kind": "soak",
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": {"cpus": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 2)},
        "python": platform.python_version(),
        "interrupted": interrupted,
        "wall_s": round(wall_s, 1),
        "requests": made,
        "requests_per_s": round(made / wall_s, 1),
        "outcomes": {name: tally.outcomes[name] for name in OUTCOMES},
        "examples": tally.examples[:5],
        "ttft_s": _quantiles(tally.ttft_s),
        "duration_s": _quantiles(tally.duration_s),
        "left_behind": left,
        "controller_outcomes": counters,
        "cpu_ms_per_request": {n: round(s * 1e3 / max(made, 1), 3) for n, s in cpu.items()},
        "memory": {name: _memory(samples, name) for name in processes},
        "fds_at_end": drained_fds,
        "samples": [asdict(s) for s in samples[:: max(1, len(samples) // 100)]],
    }


def as_it_must_be(report: dict[str, Any]) -> bool:
    """Whether no reply was amiss and every slot came back."""
    faults = {k: n for k, n in report["outcomes"].items() if k not in (*GOOD, "refused")}
    return not any(faults.values()) and not any(report["left_behind"].values())


def show(report: dict[str, Any], console: Console) -> None:
    """The report for people."""
    replies = Table(title=f"{report['requests']} requests, {report['requests_per_s']} a second")
    for name in OUTCOMES:
        replies.add_column(name, justify="right")
    replies.add_row(*(str(report["outcomes"][name]) for name in OUTCOMES))
    console.print(replies)
    memory = Table(title="RSS in MB after a share of the requests")
    for name in ("process", "10 %", "50 %", "100 %", "MB per 100k requests", "CPU ms/request"):
        memory.add_column(name, justify="left" if name == "process" else "right")
    for name, figures in report["memory"].items():
        cpu = report["cpu_ms_per_request"][name]
        memory.add_row(name, *(str(figure) for figure in figures.values()), str(cpu))
    console.print(memory)
    ttft, total = report["ttft_s"], report["duration_s"]
    console.print(
        f"first byte p50 {ttft['p50']} s, p99 {ttft['p99']} s; "
        f"whole answer p50 {total['p50']} s, p99 {total['p99']} s"
    )
    console.print("left behind: " + ", ".join(f"{k} {n}" for k, n in report["left_behind"].items()))
    for example in report["examples"]:
        console.print(example, style="red", markup=False)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/soak.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--streams", type=int, default=1000, help="concurrent streams (1000)")
    add("--requests", type=int, default=100_000, help="requests in all (100000)")
    add("--workers", type=int, default=2, help="echo workers (2)")
    add("--worker-capacity", type=int, default=512, help="streams a worker runs at once (512)")
    add("--clients", type=int, default=2, help="client processes (2)")
    add("--leave", type=float, default=0.05, help="share of clients that leave early (0.05)")
    add("--bad", type=float, default=0.02, help="share of wrong requests (0.02)")
    add("--min-tokens", type=int, default=16, help="shortest answer (16)")
    add("--max-tokens", type=int, default=40, help="longest answer (40)")
    add("--token-delay-s", type=float, default=0.01, help="the workers' pause per token (0.01)")
    add("--timeout-s", type=float, default=120.0, help="longest wait for a whole reply (120)")
    add("--seed", type=int, default=0, help="of the random choices (0)")
    add("--out", type=Path, help="write the JSON report to this file")
    args = parser.parse_args(argv)
    for name in ("streams", "requests", "workers", "worker_capacity", "clients"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 2 <= args.min_tokens <= args.max_tokens:
        parser.error("--min-tokens must be at least 2 and at most --max-tokens")
    args.clients = min(args.clients, args.streams)
    return args


def main() -> int:
    args = parse()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 2 * args.streams + 200:
        sys.stderr.write(f"error: {hard} open files are too few for {args.streams} streams.\n")
        return 2
    report = soak(args)
    if args.out is not None:
        report["settings"]["out"] = None
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report, Console(width=120))
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}))
    return 0 if as_it_must_be(report) else 1


if __name__ == "__main__":
    raise SystemExit(main())
