"""What FastChat's clients ask about a model, passed on to a worker that serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from controller.dispatch import Demand, eligible
from controller.foreign import is_foreign
from controller.liveness import Liveness
from controller.registry import Registry, Replica
from protocol.errors import NotFound, TandemError, Unsupported, UpstreamLost, from_wire
from transport.client import HttpPool

_TIMEOUT_S = 30.0


class Questions:
    """Asks one worker; another one when that is lost or does not know the question."""

    def __init__(self, registry: Registry, liveness: Liveness, pool: HttpPool) -> None:
        self._registry = registry
        self._liveness = liveness
        self._pool = pool

    async def ask(self, model: str, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """The first answer to a POST of ``body`` to ``path`` of a worker that serves ``model``.

        Raises:
            ModelNotFound, AdapterNotFound, NoReplicaAvailable: no ready worker serves it.
            Unsupported: none of them knows the question.
            TandemError: what the last one said or suffered.
        """
        demand = Demand(model, None, None, frozenset(), 0.0, 0)
        # Ours first: a template is the model's own there, and chosen by its name in FastChat.
        replicas = sorted(
            eligible(self._registry, demand), key=lambda replica: is_foreign(replica.status)
        )
        failure: TandemError = Unsupported(f"No worker of {model!r} knows {path}.")
        for replica in replicas:
            try:
                return await self._ask(replica, path, orjson.dumps(body))
            except TandemError as error:
                self._liveness.suspect(replica, error)
                if isinstance(error, NotFound):  # LLaVA's has no such route
                    continue
                failure = error
                if not error.retry_elsewhere:
                    break
        raise failure

    async def _ask(self, replica: Replica, path: str, body: bytes) -> dict[str, Any]:
        upstream = await self._pool.open(replica.address, path, body, timeout_s=_TIMEOUT_S)
        try:
            answer = await upstream.read_all(_TIMEOUT_S)
            status = upstream.status
        finally:
            upstream.close()
        try:
            fields = orjson.loads(answer)
            if status == 200 and isinstance(fields, dict):
                return fields
            error = fields["error"]
            raise from_wire(error["code"], error["message"], error["remedy"])
        except (orjson.JSONDecodeError, TypeError, KeyError):
            if status in (404, 405):
                raise NotFound(f"{replica.worker_id} does not know {path}.") from None
            raise UpstreamLost(f"{replica.worker_id} answered {status}.") from None
