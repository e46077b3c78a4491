"""Wrong pictures, sent as clients send them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import psutil

from bench.fuzz import pictures
from bench.fuzz.findings import Findings, bar, until_stopped
from bench.fuzz.verdict import BROKEN, Fault, outcome
from bench.processes import Harness, Running
from bench.results import Keep, record
from bench.soak.cluster import leftovers, wait_ready
from protocol.events import SSE_MEDIA_TYPE

GENERATE, CHAT = "/worker_generate_stream", "/v1/chat/completions"
CHECK_EVERY = 500  # cases, then a good picture must be answered
CASE_TIMEOUT_S = 120.0
NOT_BUSY = frozenset({"no_replica", "overloaded", "draining"})
"""What no request may get while one worker with room for all of them serves."""


@dataclass(frozen=True, slots=True)
class Request:
    route: str
    accept: str
    body: bytes
    prompt: str
    what: str


def request_of(case: pictures.Case, rng: Random, model: str) -> Request:
    """``case`` in one of the ways in which clients send images."""
    fields: dict[str, Any] = {"model": model, "temperature": 0}
    question = "What is this?"
    places = "<image>" * len(case.images)
    way = rng.choice(("sse", "sse", "nul", "chat", "chat stream"))
    if way in ("sse", "nul"):
        fields |= {"images": case.images, "max_new_tokens": 6}
        if way == "nul":
            prompt = f"USER: {places}{question} ASSISTANT:"
            body = json.dumps(fields | {"prompt": prompt}).encode()
            return Request(GENERATE, "*/*", body, prompt, case.what)
        fields["messages"] = [{"role": "user", "content": places + question}]
        return Request(GENERATE, SSE_MEDIA_TYPE, json.dumps(fields).encode(), "", case.what)
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    content += [{"type": "image_url", "image_url": {"url": _uri(image)}} for image in case.images]
    fields["messages"] = [{"role": "user", "content": content}]
    fields |= {"max_tokens": 6, "stream": way == "chat stream"}
    return Request(CHAT, "*/*", json.dumps(fields).encode(), "", case.what)


def _uri(image: Any) -> Any:
    bare = isinstance(image, str) and ":" not in image[:20]
    return f"data:image/png;base64,{image}" if bare else image


class _Run:
    """Cases against one controller, ``concurrency`` at once."""

    def __init__(self, controller: Running, worker: Running, *, seed: int, model: str) -> None:
        self.findings = Findings()
        self._controller = controller
        self._worker = worker
        self._seed = seed
        self._model = model
        self._born = (worker.process.pid, worker.status().epoch)
        self._rss_bytes = {"controller": [0], "worker": [0]}
        self._idle_mb: list[float] = []  # of the worker, after each good picture

    async def go(self, cases: int, concurrency: int) -> None:
        with bar() as progress:
            task = progress.add_task("images", total=cases, note="")

            async def some(numbers: Iterator[int]) -> None:
                async with self._client() as client:
                    for number in numbers:
                        await self._case(client, number)
                        note = f"{self.findings.faults} faults"
                        progress.update(task, advance=1, note=note)

            watching = asyncio.create_task(self._watch())
            try:
                for start in range(0, cases, CHECK_EVERY):
                    numbers = iter(range(start, min(cases, start + CHECK_EVERY)))
                    async with asyncio.TaskGroup() as group:
                        for _ in range(concurrency):
                            group.create_task(some(numbers))
                    async with self._client() as client:
                        await self._good(client)
            finally:
                watching.cancel()

    def _client(self) -> httpx.AsyncClient:
        """One for each task: httpx's pool sometimes closes a connection that another one uses."""
        address = self._controller.address
        return httpx.AsyncClient(base_url=address, timeout=CASE_TIMEOUT_S, trust_env=False)

    async def _watch(self) -> None:
        while True:
            for name, process in (("controller", self._controller), ("worker", self._worker)):
                with suppress(psutil.NoSuchProcess):
                    self._rss_bytes[name].append(process.process.memory_info().rss)
            await asyncio.sleep(0.2)

    async def _case(self, client: httpx.AsyncClient, number: int) -> None:
        rng = Random(f"{self._seed}-{number}")
        request = request_of(pictures.images(rng), rng, self._model)
        try:
            code = await self._sent(client, request)
            if code in BROKEN | NOT_BUSY:
                raise Fault(f"a picture is answered with {code}")
        except Fault as fault:
            code = "fault"
            url = self._controller.address + request.route
            headers = {"content-type": "application/json", "accept": request.accept}
            curl = self.findings.curl("POST", url, request.body, headers)
            self.findings.fault(request.route, f"case {number}: {request.what}", str(fault), curl)
        self.findings.count(request.route, code)

    async def _sent(self, client: httpx.AsyncClient, request: Request) -> str:
        headers = {"content-type": "application/json", "accept": request.accept}
        try:
            answer = await client.post(request.route, content=request.body, headers=headers)
        except httpx.HTTPError as exc:
            raise Fault(f"no complete answer: {type(exc).__name__} {exc}") from exc
        media_type = answer.headers.get("content-type", "").partition(";")[0]
        return outcome(
            *(request.route, answer.status_code, media_type, answer.content), prompt=request.prompt
        )

    async def _good(self, client: httpx.AsyncClient) -> None:
        """A good picture is answered, by the process that was there at the beginning."""
        route = GENERATE
        request = request_of(
            pictures.Case("a good picture", [pictures.red_circle()]), Random(0), self._model
        )
        try:
            code = await self._sent(client, request)
            if code != "ok":
                raise Fault(f"a good picture is answered with {code}")
            response = await client.post(f"{self._worker.address}/worker_get_status")
            if (self._worker.process.pid, response.json()["epoch"]) != self._born:
                raise Fault("the worker is another process")
            self._idle_mb.append(round(self._worker.process.memory_info().rss / 1e6, 1))
        except (Fault, httpx.HTTPError) as exc:
            self.findings.fault(route, "a good picture", str(exc))

    def at_the_end(self, allowed_mb: int) -> dict[str, Any]:
        """What is left behind, and the memory; faults are noted."""
        if not self._worker.process.is_running():
            self.findings.fault(GENERATE, "the end", "the worker has ended")
            return {}
        deadline = time.monotonic() + 15
        while any((left := self._left()).values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if any(left.values()):
            self.findings.fault(GENERATE, "the end", f"left behind: {left}")
        memory = {}
        for name, values in self._rss_bytes.items():
            start, peak, end = (value / 1e6 for value in (values[1], max(values), values[-1]))
            memory[name] = {"start_mb": start, "peak_mb": peak, "end_mb": end}
            if peak - start > allowed_mb:
                grown = f"{name} grew by {peak - start:.0f} MB, {allowed_mb} are allowed"
                self.findings.fault(GENERATE, "the end", grown)
        return {"left_behind": left, "memory": memory, "worker_idle_mb": self._idle_mb}

    def _left(self) -> dict[str, int]:
        return leftovers(self._controller.address, [self._worker.address])


def run(
    harness: Harness,
    keep: Keep,
    *,
    kind: str,
    cases: int,
    seed: int,
    concurrency: int,
    memory_mb: int,
) -> None:
    """Send ``cases``, print, and keep the line of results.

    Raises:
        ProcessFailed: a process did not start, or does not answer at the end.
    """
    with (
        harness.process("controller") as controller,
        harness.worker(kind=kind, controller=controller.address) as worker,
    ):
        wait_ready(controller.address, 1)
        status = worker.status()
        one = _Run(controller, worker, seed=seed, model=status.model_names[0])
        took = until_stopped(lambda: asyncio.run(one.go(cases, concurrency)))
        ended = one.at_the_end(memory_mb)
    findings = one.findings
    findings.show(harness.console, f"{findings.cases} requests with pictures to {kind}")
    for name, memory in ended.get("memory", {}).items():
        said = ", ".join(f"{key[:-3]} {value:.0f}" for key, value in memory.items())
        harness.console.print(f"{name}, MB: {said}")
    figures = {
        "worker": kind,
        "seed": seed,
        "concurrency": concurrency,
        **took,
        **ended,
        **findings.as_json(),
    }
    keep(record("fuzz_images", status, figures))
    if took["interrupted"]:
        raise KeyboardInterrupt
