"""Ending tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from anyio import CancelScope


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel ``tasks`` and return when they have ended, whatever they end with.

    A cancelled anyio scope cancels what is awaited in it again and again, and so would break off
    the tasks' own cleanup; hence the shield.
    """
    ending = list(tasks)
    for task in ending:
        task.cancel()
    with CancelScope(shield=True):
        await asyncio.gather(*ending, return_exceptions=True)
