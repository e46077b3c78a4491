"""Cancelling a computation from outside its thread, within one operation of the network.

Between two tokens a computation asks by itself; a prompt is seconds without one. So the network's
modules ask, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_thread = threading.local()


class Cancelled(Exception):
    """The request was closed; nobody reads its answer."""


@contextmanager
def cancellable(event: threading.Event) -> Iterator[None]:
    """Let ``event`` cancel what this thread computes within the block.

    Raises:
        Cancelled: from ``check`` or from the network, once ``event`` is set.
    """
    _thread.event = event
    try:
        check()
        yield
    finally:
        del _thread.event


def check() -> None:
    """Go on, or not.

    Raises:
        Cancelled: the event of this thread is set.
    """
    event: threading.Event | None = getattr(_thread, "event", None)
    if event is not None and event.is_set():
        raise Cancelled


def install(network: Any) -> None:
    """Make the layers of ``network``, those of its vision tower too, ask before they compute.

    On a CPU a layer can take a second, so there each matrix asks; an accelerator runs behind the
    thread that feeds it, and asking more often would only slow that down.
    """
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(_before)
        elif isinstance(module, nn.Linear) and network.device.type == "cpu":
            module.register_forward_pre_hook(_before)


def _before(module: Any, args: Any) -> None:
    check()
