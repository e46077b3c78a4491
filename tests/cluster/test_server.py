"""The HTTP server of every process."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from transport.asgi import send_json
from transport.process import Server, bind


async def test_a_start_that_is_cancelled_leaves_nothing_that_listens() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        await send_json(send, 200, {})  # type: ignore[arg-type]

    sock = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    start = asyncio.create_task(Server(app, sock, grace_s=1).start())
    await asyncio.sleep(0)  # the server has begun and is not ready yet
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(address)
