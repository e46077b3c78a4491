"""Notice a peer's death at once, between the rare heartbeats.

An idle TCP connection costs nothing, and the kernel closes it when the process at its other end
goes away, however it goes.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from urllib.parse import urlsplit


async def closed(
    base_url: str, *, tls: ssl.SSLContext | None = None, connect_timeout_s: float = 2.0
) -> None:
    """Hold a connection to ``base_url`` and return when the peer has closed it.

    ``tls`` is for an https address.

    Raises:
        OSError: it cannot be opened (TimeoutError is one, and so is a certificate's refusal).
    """
    parts = urlsplit(base_url)
    async with asyncio.timeout(connect_timeout_s):
        port = parts.port or (80 if tls is None else 443)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls)
    try:
        with suppress(ConnectionError):
            await reader.read()  # a server never speaks first: this ends with the connection
    finally:
        writer.close()
