"""SGLang's own stream, read as a client of SGLang would."""

from __future__ import annotations

import orjson

from bench.client import Answer, Asked, Chunks

PATH = "/generate"


def asked(body: bytes) -> Asked:
    return Asked(body, path=PATH, decode=answer_of)


def answer_of(chunks: Chunks, sent_at: float, end: str = "", message: str = "") -> Answer:
    """Decode what ``/generate`` streams; ``text`` and ``token_ids`` may be those so far, or new."""
    times: list[float] = []
    pending = b""
    for at, data in chunks:
        *frames, pending = (pending + data).split(b"\n\n")
        for frame in frames:
            payload = frame.removeprefix(b"data: ")
            if payload == b"[DONE]":
                continue
            found = orjson.loads(payload)
            if "error" in found:
                end, message = "error", str(found["error"])
                continue
            meta = found["meta_info"]
            times += [at] * (meta["completion_tokens"] - len(times))
            if meta["finish_reason"] is not None:
                end = meta["finish_reason"]["type"]
    return Answer(
        end=end or "cut",
        token_at=tuple(times),
        sent_at=sent_at,
        ended_at=chunks[-1][0] if chunks else sent_at,
        message=message,
    )
