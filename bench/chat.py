"""The chat page under many chats at once: how far pages lag behind the worker.

    python bench/chat.py --chats 20

Starts a controller, an echo worker that writes at a steady pace, and the chat page. First as many
clients as asked for read their streams from the controller itself; then as many chats do what a
browser does: send a question and read the page's updates. The lag is how much later the complete
answer is on the page than with the clients; the longest pause is between two updates of one page.
Prints a line, then JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
ANSWERED = 'data-testid=\\"bot-turn\\"'


@dataclass
class Chat:
    """What one page saw."""

    begun_at: float
    updates: list[float] = field(default_factory=list)
    ended_at: float = 0.0

    @property
    def pause_s(self) -> float:
        gaps = [b - a for a, b in zip(self.updates, self.updates[1:], strict=False)]
        return max(gaps, default=0.0)


def start(stack: ExitStack, module: str, *args: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, "--log-level", "ERROR", *args]
    process = subprocess.Popen(command, cwd=ROOT)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


async def ready(address: str) -> None:
    """Until the page is there and has seen the worker."""
    async with httpx.AsyncClient(trust_env=False) as client:
        for _ in range(600):
            with suppress(httpx.TransportError):
                if (await client.get(f"{address}/healthz")).json()["models"]:
                    return
            await asyncio.sleep(0.1)
    raise SystemExit("error: the page has no model after 60 s")


class Site:
    """The page's events, by what starts them."""

    def __init__(self, address: str, config: dict[str, Any]) -> None:
        self.address = address
        self._box = next(  # the first page's; others have one, too
            component["id"]
            for component in config["components"]
            if component["props"].get("elem_id") == "box"
        )
        self._submit = self._event(config, self._box, "submit")
        self._load = self._event(config, None, "load")
        self._follow = self._after(config, self._submit)
        self._finish = self._after(config, self._follow)

    @staticmethod
    def _event(config: dict[str, Any], component: int | None, name: str) -> int:
        """Gradio's number of an event."""
        for index, event in enumerate(config["dependencies"]):
            for target, named in event["targets"]:
                if named == name and component in (None, target):
                    return index
        raise SystemExit(f"error: the page has no event {name}")

    @staticmethod
    def _after(config: dict[str, Any], event: int) -> int:
        """The event that a browser starts when this one is complete."""
        dependencies = config["dependencies"]
        before = dependencies[event]["id"]
        return next(i for i, d in enumerate(dependencies) if d["trigger_after"] == before)

    async def chat(self, model: str, question: str) -> Chat:
        """Open the page, ask, and read updates until the answer is in the transcript."""
        session = secrets.token_hex(6)
        asked = [None, {"text": question, "files": []}, model, "auto", "", 0.2, 1.0, 1024, "", ""]
        async with httpx.AsyncClient(
            base_url=self.address, timeout=httpx.Timeout(120), trust_env=False
        ) as client:
            (await client.get("/")).raise_for_status()  # the cookie
            await self._run(client, session, self._load, [None], Chat(0.0))
            chat = Chat(time.perf_counter())
            await self._run(client, session, self._submit, asked, chat)
            await self._run(client, session, self._follow, [None], chat)
            await self._run(client, session, self._finish, [None], chat)
            return chat

    async def _run(
        self, client: httpx.AsyncClient, session: str, event: int, data: list[Any], chat: Chat
    ) -> None:
        body = {"data": data, "fn_index": event, "session_hash": session, "trigger_id": self._box}
        (await client.post("/gradio_api/queue/join", json=body)).raise_for_status()
        url = f"/gradio_api/queue/data?session_hash={session}"
        async with client.stream("GET", url) as stream:
            async for line in stream.aiter_lines():
                now = time.perf_counter()
                if ANSWERED in line:
                    chat.ended_at = chat.ended_at or now
                elif '"process_generating"' in line:
                    chat.updates.append(now)
                if '"process_completed"' in line:
                    if '"success":true' not in line.replace(" ", ""):
                        raise SystemExit(f"error: the page said {line[:300]}")
                    return
        raise SystemExit("error: the page ended the stream early")


async def measure(
    args: argparse.Namespace, controller: str, address: str, page: int
) -> dict[str, Any]:
    await ready(address)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        site = Site(address, (await client.get(f"{address}/config")).json())
    question = " ".join(["word"] * args.tokens)
    await site.chat("echo", "warm up")
    direct = await asyncio.gather(*(ask(controller, question) for _ in range(args.chats)))
    process = psutil.Process(page)
    before = process.cpu_times()
    chats = await asyncio.gather(*(site.chat("echo", question) for _ in range(args.chats)))
    after = process.cpu_times()
    took = max(chat.ended_at for chat in chats) - min(chat.begun_at for chat in chats)
    times = [chat.ended_at - chat.begun_at for chat in chats]
    used = after.user + after.system - before.user - before.system
    return {
        "chats": args.chats,
        "tokens": args.tokens,
        "client_median_s": round(statistics.median(direct), 3),
        "page_median_s": round(statistics.median(times), 3),
        "page_worst_s": round(max(times), 3),
        "lag_s": round(statistics.median(times) - statistics.median(direct), 3),
        "longest_pause_s": round(max(chat.pause_s for chat in chats), 3),
        "updates_per_s_each": round(
            statistics.mean(len(chat.updates) for chat in chats) / statistics.median(times), 1
        ),
        "page_cpu_cores": round(used / took, 2),
        "page_rss_mb": round(process.memory_info().rss / 1e6),
    }


async def ask(controller: str, question: str) -> float:
    """Seconds until a client has the whole answer."""
    begun_at = time.perf_counter()
    body = {"model": "echo", "prompt": question, "max_new_tokens": 1024}
    headers = {"accept": "text/event-stream"}
    async with (
        httpx.AsyncClient(base_url=controller, timeout=120, trust_env=False) as client,
        client.stream("POST", "/worker_generate_stream", json=body, headers=headers) as stream,
    ):
        async for _ in stream.aiter_raw():
            pass
    return time.perf_counter() - begun_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--delay-s", type=float, default=0.02, help="between two tokens")
    parser.add_argument("--port", type=int, default=21201, help="the first of three")
    args = parser.parse_args()
    controller, worker, page = (args.port + index for index in range(3))
    at = f"http://127.0.0.1:{controller}"
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        start(stack, "controller", "--port", str(controller))
        start(
            stack, "workers.echo", "--port", str(worker), "--controller-address", at,
            "--delay-s", str(args.delay_s), "--limit-model-concurrency", str(args.chats),
        )  # fmt: skip
        ui = start(
            stack, "ui", "--port", str(page), "--controller-address", at, "--data-dir", folder
        )
        found = asyncio.run(measure(args, at, f"http://127.0.0.1:{page}", ui.pid))
    print(
        f"{found['chats']} chats of {found['tokens']} tokens: clients have the answer after "
        f"{found['client_median_s']:.2f} s, the page {found['lag_s']:.2f} s later; longest pause "
        f"{found['longest_pause_s']:.2f} s, {found['page_cpu_cores']:.2f} cores"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
