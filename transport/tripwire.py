"""Notice a peer's death at once, between the rare heartbeats.

An idle TCP connection costs nothing, and the kernel closes it when the process at its other end
goes away, however it goes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import urlsplit


async def closed(base_url: str, *, connect_timeout_s: float = 2.0) -> None:
    """Hold a connection to ``base_url`` and return when the peer has closed it.

    Raises:
        OSError: it cannot be opened (TimeoutError is one).
    """
    parts = urlsplit(base_url)
    async with asyncio.timeout(connect_timeout_s):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        with suppress(ConnectionError):
            await reader.read()  # a server never speaks first: this ends with the connection
    finally:
        writer.close()
