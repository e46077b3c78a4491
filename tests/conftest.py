"""What every level shares: one event loop, and a watch on it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

OURS = ["cluster", "controller", "protocol", "transport", "ui", "workers"]


def pytest_configure() -> None:
    """SIGTERM ends the tests as Ctrl-C does: what they started, or stopped, is put back."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def blockbuster(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """Fail an async test in which our code blocks the event loop.

    Only calls with our code on the stack count: tests may read files. A test that starts an
    engine which has to block while it loads can ``deactivate()`` what this yields.
    """
    if "anyio_backend" not in request.fixturenames:
        yield None
        return
    with blockbuster_ctx(OURS) as watch:
        # httpx reads its certificates when a client is made, which is at start.
        for name in ("os.stat", "io.TextIOWrapper.read", "io.BufferedReader.read"):
            watch.functions[name].can_block_in("httpx/_config.py", "create_ssl_context")
        yield watch
