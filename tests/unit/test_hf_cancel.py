"""workers.hf.cancel: one thread's computation stops between two layers, nobody else's.

pytest tests/unit/test_hf_cancel.py
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("torch")

from torch import device, nn

from workers.hf import cancel


class Network(nn.Module):  # type: ignore[misc]
    """Two layers; ``between`` is called after the first."""

    device = device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.ran = 0

    def forward(self, between: Any) -> None:
        self.layers[0](0)
        self.ran += 1
        between()
        self.layers[1](0)
        self.ran += 1


@pytest.fixture
def network() -> Network:
    network = Network()
    cancel.install(network)
    return network


def test_a_set_event_stops_the_next_layer(network: Network) -> None:
    event = threading.Event()
    with pytest.raises(cancel.Cancelled), cancel.cancellable(event):
        network(event.set)
    assert network.ran == 1


def test_another_threads_event_is_not_ours(network: Network) -> None:
    def cancel_another() -> None:
        event = threading.Event()
        event.set()

        def work() -> None:
            with pytest.raises(cancel.Cancelled), cancel.cancellable(event):
                pass

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(5)

    with cancel.cancellable(threading.Event()):
        network(cancel_another)
    assert network.ran == 2


def test_outside_the_block_nothing_is_cancelled(network: Network) -> None:
    event = threading.Event()
    with cancel.cancellable(event):
        event.set()
    network(lambda: None)
    assert network.ran == 2
