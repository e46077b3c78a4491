"""The adapters that requests can choose, and their life in SGLang.

SGLang loads an adapter that it was told to unload again, silently, when a request names it. So each
load has a name of its own there, which no request can know, and its files are gone once SGLang has
read them. Nothing of what an adapter computed is met by the next one of its name: SGLang keeps the
prefix cache apart by load, and so do we.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio

from protocol.errors import (
    AdapterNotFound,
    EngineFailed,
    InvalidRequest,
    TandemError,
    Unsupported,
)
from protocol.messages import ADAPTER_NAME, BASE
from workers.sglang.client import SglangClient
from workers.sglang.process import TemporaryDirectory
from workers.sglang.settings import SglangSettings
from workers.sglang.targets import TARGETS

log = logging.getLogger(__name__)

LEAVE_S = 2.0
"""How long taking our adapters out of a server that goes on without us may take."""


@dataclass(frozen=True, slots=True)
class Rewritten:
    """An adapter in the form that SGLang computes; it lasts until SGLang has read it."""

    path: str  # what the user gave
    folder: str
    rank: int


def largest_rank(settings: SglangSettings) -> int:
    """The rank the server must have room for; 0 if it needs none. Blocking.

    Raises:
        EngineFailed: what --adapter names is no adapter, or cannot be fetched.
    """
    from workers.adapters.config import config_of, rank_of

    ranks = [rank_of(config_of(path)[1]) for path in settings.adapters.values()]
    return max([settings.max_adapter_rank or 0, *ranks])


class Adapters:
    """What of ``adapter`` requests may say, and what SGLang calls it."""

    def __init__(self, settings: SglangSettings, directory: TemporaryDirectory) -> None:
        self._settings = settings
        self._files = _Files(settings, directory)
        self._prepared: dict[str, Rewritten] = {}
        self._client: SglangClient | None = None
        self._rank: int | None = None  # the largest there is room for; None: SGLang says
        self._names: dict[str, str] = {}  # those of SGLang, by ours
        self._coming: set[str] = set()
        self._leaving: dict[str, asyncio.Event] = {}  # by our name; set when nobody uses it
        self._users: Counter[str] = Counter()  # by our name
        self._ours: set[str] = set()  # SGLang's names of those that we loaded

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests can choose now, in order of loading."""
        return tuple(name for name in self._names if name not in self._leaving)

    @property
    def enabled(self) -> bool:
        """Whether the server takes any."""
        return self._client is not None

    def prepare(self, config: Any = None) -> None:
        """Read those of --adapter while the server starts; blocking.

        ``config`` is the network's where the checkpoint's own files do not hold transformers'.

        Raises:
            EngineFailed: one cannot be read, does not fit, or is none that SGLang can compute.
        """
        self._files.config = config
        for name, path in self._settings.adapters.items():
            self._prepared[name] = self._files.rewrite(path)

    async def open(self, client: SglangClient, server: Mapping[str, Any]) -> None:
        """Load what was prepared into the server, which describes itself as ``server``.

        Raises:
            EngineFailed: it does not take adapters, or not these.
        """
        if not server.get("enable_lora"):
            if self._prepared:
                raise EngineFailed(
                    f"{client.base_url} takes no adapters.",
                    remedy="Start it with --enable-lora, --max-lora-rank and "
                    f"--lora-target-modules {' '.join(TARGETS)}.",
                )
            return
        self._client = client
        self._rank = server.get("max_lora_rank")
        for name in await client.adapters():  # of the server's own --lora-paths
            if name == BASE or not re.fullmatch(ADAPTER_NAME, name):
                log.warning("SGLang's adapter %r has no name that a request can say", name)
            else:
                self._names[name] = name
        try:
            for name, rewritten in self._prepared.items():
                await self._hold(name, rewritten)
        except InvalidRequest as error:
            raise EngineFailed(error.message, remedy=error.remedy) from error
        self._prepared.clear()

    async def load(self, name: str, path: str) -> None:
        """Let requests choose ``name``.

        Raises:
            InvalidRequest: the name is taken, or what is at ``path`` does not fit.
            Unsupported: the server was started without room for adapters.
            EngineFailed: SGLang cannot hold it; nothing has changed in any of these cases.
        """
        self._check_enabled()
        self._check_free(name)
        try:
            rewritten = await asyncio.to_thread(self._files.rewrite, path)
        except EngineFailed as error:
            raise InvalidRequest(error.message, remedy=error.remedy) from error
        await self._hold(name, rewritten)

    async def _hold(self, name: str, rewritten: Rewritten) -> None:
        """Have SGLang load ``rewritten``, and remove its files."""
        client = self._check_enabled()
        try:
            self._check_free(name)
            if self._rank is not None and rewritten.rank > self._rank:
                raise InvalidRequest(
                    f"The adapter {rewritten.path} has rank {rewritten.rank}; there is room for "
                    f"adapters up to rank {self._rank}.",
                    remedy=f"Start the worker with --max-adapter-rank {rewritten.rank}.",
                )
            known = f"{name}:{uuid.uuid4().hex}"
            self._coming.add(name)
            self._ours.add(known)
            try:
                await client.load_adapter(known, rewritten.folder)
                self._names[name] = known
            except InvalidRequest:
                self._ours.discard(known)
                raise
            except BaseException:
                await self._take_out(client, [known])  # it may have come in all the same
                raise
            finally:
                self._coming.discard(name)
        finally:
            await asyncio.to_thread(shutil.rmtree, rewritten.folder, ignore_errors=True)

    async def unload(self, name: str) -> None:
        """Let the answers that use ``name`` end, then have SGLang free it.

        Raises:
            AdapterNotFound: it is not loaded.
            EngineFailed: SGLang does not free it; no request can choose it any more.
        """
        client = self._check_enabled()
        self._check(name)
        unused = self._leaving[name] = asyncio.Event()
        try:
            if self._users[name]:
                await unused.wait()
            known = self._names.pop(name)
        finally:
            del self._leaving[name]
        await client.unload_adapter(known)
        self._ours.discard(known)

    @contextmanager
    def using(self, name: str | None) -> Iterator[str | None]:
        """What SGLang calls ``name``, which is not unloaded within this block.

        Raises:
            AdapterNotFound: it is not loaded, or about to leave.
        """
        if name is None:
            yield None
            return
        self._check(name)
        self._users[name] += 1
        try:
            yield self._names[name]
        finally:
            self._users[name] -= 1
            if not self._users[name] and name in self._leaving:
                self._leaving[name].set()

    async def aclose(self) -> None:
        """Leave a server that goes on without us as it was; repeatable."""
        client, self._client = self._client, None
        if client is not None and self._settings.sgl_endpoint is not None:
            await self._take_out(client, list(self._ours))

    async def _take_out(self, client: SglangClient, names: Sequence[str]) -> None:
        """Have SGLang free what it has of ``names``, in vain if it does not answer."""
        with anyio.move_on_after(LEAVE_S, shield=True):
            for known in names:
                with suppress(TandemError):
                    await client.unload_adapter(known)
                    self._ours.discard(known)

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise AdapterNotFound(f"No adapter {name!r} is loaded.")

    def _check_free(self, name: str) -> None:
        if name in self._names or name in self._coming:
            raise InvalidRequest(
                f"An adapter {name!r} is loaded already.",
                remedy="Unload it first, or choose another name.",
            )

    def _check_enabled(self) -> SglangClient:
        if self._client is None:
            raise Unsupported(
                "This worker was started without room for adapters.",
                remedy="Start it with --adapter, or with --max-adapter-rank.",
            )
        return self._client


class _Files:
    """Rewrites adapters, one after the other, each into a folder that lasts until it is read."""

    def __init__(self, settings: SglangSettings, directory: TemporaryDirectory) -> None:
        self.config: Any = None  # of the network; None: that at --model-path
        self._settings = settings
        self._directory = directory
        self._network: Any = None
        self._lock = threading.Lock()

    def rewrite(self, path: str) -> Rewritten:
        from workers.sglang.adapter_files import rewrite, skeleton

        with self._lock:
            if self._network is None:
                self._network = skeleton(
                    self.config or self._settings.model_path,
                    trust_remote_code=self._settings.trust_remote_code,
                )
            folder = tempfile.mkdtemp(prefix="adapter-", dir=self._directory.make())
            try:
                return Rewritten(path, folder, rewrite(self._network, path, folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
