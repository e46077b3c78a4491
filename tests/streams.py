"""Ask a worker or a controller over a real socket, and see what came, event by event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from protocol.events import Delta, Event, Failed, Finished, SseDecoder

PATH = "/worker_generate_stream"
SSE = {"accept": "text/event-stream"}


@dataclass(frozen=True)
class Answer:
    """A whole stream."""

    events: tuple[Event, ...]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def token_ids(self) -> list[int]:
        return [i for event in self.events if isinstance(event, Delta) for i in event.token_ids]

    @property
    def finished(self) -> Finished:
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return last

    @property
    def failed(self) -> Failed:
        last = self.events[-1]
        assert isinstance(last, Failed), last
        return last


def ask(address: str, *, timeout_s: float = 60, **fields: Any) -> Answer:
    """One request; the test fails unless it is answered with a stream."""
    with streaming(address, timeout_s=timeout_s, **fields) as events:
        return Answer(tuple(events))


@contextmanager
def streaming(address: str, *, timeout_s: float = 60, **fields: Any) -> Iterator[Iterator[Event]]:
    """One request whose events are taken one by one; leaving the block closes the connection."""
    client = httpx.Client(timeout=timeout_s)
    with client, client.stream("POST", address + PATH, json=fields, headers=SSE) as response:
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {response.read()!r}")

        def events() -> Iterator[Event]:
            decoder = SseDecoder()
            for data in response.iter_bytes():
                yield from decoder.feed(data)
            assert not decoder.pending

        yield events()


def refusal(address: str, body: bytes | None = None, **fields: Any) -> tuple[int, dict[str, Any]]:
    """The status and the error of a request that must be refused."""
    if body is None:
        response = httpx.post(address + PATH, json=fields, headers=SSE, timeout=60)
    else:
        response = httpx.post(address + PATH, content=body, headers=SSE, timeout=60)
    assert response.status_code != 200, response.text
    error = response.json()["error"]
    assert error["message"], error
    assert error["remedy"], error
    return response.status_code, error


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


UNDECIDED: dict[str, Any] = {
    "model": "pocket-llava",
    "messages": user("Hello!"),
    "regex": "((red|blue|green|dog|cat) ){12}",
    "temperature": 0,
    "max_new_tokens": 32,
}
"""Where the embedded model is sure of no token, so that each penalty changes its answer."""
