"""What one open page looks at. It lives as long as the page and holds nothing worth keeping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager, suppress

HANDOVER_S = 3.0


class View:
    """The conversation a page shows, and who may write on the page.

    A page has one writer at a time. A newer one asks the writer before it to end and waits until
    it has: an update of an older state can then not arrive after the newer state.
    """

    def __init__(self) -> None:
        self.conversation: str | None = None
        self.search = ""
        self.seen: Hashable = None
        self.unfinished = False  # the page shows an answer as one that is being written
        self.ended = False  # the answer that was followed is complete and not yet in its place
        self._writers = 0
        self._turn = asyncio.Lock()
        self._wake: Callable[[], None] | None = None

    def __deepcopy__(self, memo: object) -> View:
        """Gradio copies the initial value of a state for each page."""
        return View()

    @property
    def stuck(self) -> bool:
        """Whether an answer is shown as being written, and nobody is about to change that."""
        return self.unfinished and not self.ended and not self._turn.locked()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Callable[[], bool]]:
        """Be the page's writer; what this yields says whether one still is."""
        self._writers += 1
        mine = self._writers
        if self._wake is not None:
            self._wake()
        acquired = False
        with suppress(TimeoutError):  # a reader that left without a word holds nobody up
            async with asyncio.timeout(HANDOVER_S):
                acquired = await self._turn.acquire()
        try:
            yield lambda: mine == self._writers
        finally:
            if mine == self._writers:
                self._wake = None
            if acquired:
                self._turn.release()

    def on_handover(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when another writer comes."""
        self._wake = wake
