"""LoRA adapters over one base: each row of a batch is computed with the one its request chose.

The network stays as it was loaded: hooks on its layers correct their outputs, so that any weights,
quantized or not, can be adapted, and taking an adapter out leaves no trace. Which rows want which
adapter is said by each thread for itself; with PEFT that is the state of the whole network.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from protocol.errors import AdapterNotFound, EngineFailed, InvalidRequest
from workers.adapters.changes import Change
from workers.adapters.files import read
from workers.hf.failures import is_out_of_memory


class _Batch:
    """Which rows want which adapter."""

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self.names = names
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                self.rows.setdefault(name, []).append(row)
        self.uniform = len(set(names)) == 1
        self._indices: dict[tuple[str, torch.device], Tensor] = {}

    def index(self, name: str, device: torch.device) -> Tensor:
        """The rows of ``name`` [n] int64; copied to ``device`` once, not once a layer."""
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.tensor(self.rows[name], device=device)
        return self._indices[name, device]


class _Here(threading.local):
    """The batch that this thread computes, and the last one, as decoding repeats it."""

    batch: _Batch | None = None
    last: _Batch | None = None


class _Layer:
    """The adapters of one linear layer."""

    def __init__(self, module: Any, here: _Here) -> None:
        self.changes: dict[str, Change] = {}
        self._here = here
        self.hook = module.register_forward_hook(self._adapt)

    def _adapt(self, module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        batch = self._here.batch
        if batch is None:
            return None
        for name in batch.rows.keys() & self.changes.keys():
            change = self.changes[name]
            x = arguments[0]
            # Of one name for all it does not matter which dimension is the batch, or whether one
            # is: a vision tower counts pictures, or patches.
            if batch.uniform:
                return change.output(x, output)
            if output.shape[0] != len(batch.names):
                raise ValueError(f"{output.shape[0]} rows, but adapters for {len(batch.names)}")
            rows = batch.index(name, output.device)
            output.index_copy_(0, rows, change.output(x[rows], output[rows]))
        return output


class Adapters:
    """The adapters loaded over ``network``, a transformers model.

    ``attach`` and ``unload`` may not run while something computes; the rest is for every thread.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._layers: dict[str, _Layer] = {}
        self._here = _Here()
        self._names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are loaded, in order of loading."""
        return self._names

    def load(self, name: str, path: str) -> None:
        """Make the adapter at ``path``, a directory or a hub id, available as ``name``; blocking.

        Raises:
            InvalidRequest: there is one of this name.
            EngineFailed: it cannot be read or held, or does not fit; nothing has changed then.
        """
        self.attach(name, self.read(path))

    def read(self, path: str) -> dict[str, Change]:
        """What the adapter at ``path`` changes, by layer, where it will compute; blocking.

        Raises:
            EngineFailed: it cannot be read or held, or does not fit.
        """
        try:
            return {
                layer: self._placed(layer, change)
                for layer, change in read(self._network, path).items()
            }
        except (MemoryError, RuntimeError) as exc:
            if not is_out_of_memory(exc):
                raise
            raise EngineFailed(
                f"There is not enough memory for the adapter {path}.",
                remedy="Unload another one, or give the worker more memory or fewer slots.",
            ) from exc

    def attach(self, name: str, changes: Mapping[str, Change]) -> None:
        """Make what was ``read`` available as ``name``.

        Raises:
            InvalidRequest: there is one of this name.
        """
        if name in self._names:
            raise InvalidRequest(
                f"An adapter {name!r} is loaded already.",
                remedy="Unload it first, or choose another name.",
            )
        for layer, change in changes.items():
            if layer not in self._layers:
                module = self._network.get_submodule(layer)
                self._layers[layer] = _Layer(module, self._here)
            self._layers[layer].changes[name] = change
        self._names += (name,)

    def unload(self, name: str) -> None:
        """Free the memory of ``name``; the base is left as if it had never been loaded.

        Raises:
            AdapterNotFound: no adapter of this name is loaded.
        """
        self._check(name)
        for path, layer in list(self._layers.items()):
            layer.changes.pop(name, None)
            if not layer.changes:
                layer.hook.remove()
                del self._layers[path]
        self._names = tuple(other for other in self._names if other != name)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within this block, what this thread computes has row ``i`` adapted by ``names[i]``.

        ``None`` is the base. Where the batch is not one row a request, as in a vision tower, all
        ``names`` must be equal.

        Raises:
            AdapterNotFound: one of ``names`` is not loaded.
        """
        here, before = self._here, self._here.batch
        here.batch = self._batch(tuple(names))
        try:
            yield
        finally:
            here.batch = before

    def _batch(self, names: tuple[str | None, ...]) -> _Batch | None:
        for name in set(names) - {None}:
            self._check(name)
        if not any(names):
            return None
        if self._here.last is None or self._here.last.names != names:
            self._here.last = _Batch(names)
        return self._here.last

    def _check(self, name: str | None) -> None:
        if name not in self._names:
            raise AdapterNotFound(f"No adapter {name!r} is loaded.")

    def _placed(self, layer: str, change: Change) -> Change:
        """``change`` where the layer computes, and in the precision it computes in."""
        weight = self._network.get_submodule(layer).weight
        whole_numbers = not weight.is_floating_point()  # quantized
        return change.to(weight.device, self._network.dtype if whole_numbers else weight.dtype)


def merge(network: Any, path: str) -> Any:
    """``network`` with the adapter at ``path`` added into its weights, in place.

    Raises:
        EngineFailed: the adapter cannot be read or does not fit, or ``network`` is quantized or
            shares an adapted weight between two layers; nothing has changed then.
    """
    changes = read(network, path)
    uses = Counter(id(weight) for _, weight in network.named_parameters(remove_duplicate=False))
    for name in changes:
        weight = network.get_submodule(name).weight
        quantized = getattr(network, "is_quantized", False) or not weight.is_floating_point()
        if quantized or uses[id(weight)] > 1:
            reason = "quantized" if quantized else "another layer's, too"
            raise EngineFailed(
                f"The adapter {path} cannot be merged: the weights of {name} are {reason}.",
                remedy="Give --no-merge to keep it beside them.",
            )
    for name, change in changes.items():
        change.merge(network.get_submodule(name))
    return network
