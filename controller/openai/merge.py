"""Several streams read at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from transport.tasks import end


async def merged(streams: Sequence[AsyncGenerator[bytes]]) -> AsyncGenerator[tuple[int, bytes]]:
    """What the streams yield, each piece with the number of its stream, as it comes.

    No stream runs ahead of the reader by more than a piece. All are closed in the end.

    Raises:
        Exception: what the first of them to fail raised; the others are cancelled.
    """
    ready: asyncio.Queue[tuple[int, bytes | Exception | None]] = asyncio.Queue(1)

    async def read(number: int, stream: AsyncGenerator[bytes]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await ready.put((number, piece))
        except Exception as error:  # noqa: BLE001 - raised where the pieces are read
            await ready.put((number, error))
        else:
            await ready.put((number, None))

    readers = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(readers)
        while running:
            number, piece = await ready.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                running -= 1
            else:
                yield number, piece
    finally:
        await end(readers)
