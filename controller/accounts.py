"""What is told of a request when it has ended: figures, one log line, and a trace if wanted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from controller.callers import NOBODY, Caller
from controller.dispatch import Demand
from controller.metrics import Metrics, ModelFigures
from controller.policy import prompt_work
from controller.registry import Replica
from protocol.errors import NotFound, TandemError
from protocol.events import Failed, Finished, Terminal
from protocol.messages import GenerateRequest
from transport.tracing import Attributes, Headers, Trace, Tracer

log = logging.getLogger(__name__)

WORKER_HEADER = b"x-tandem-worker"
KIND_HEADER = b"x-tandem-kind"
"""Of an answer: the worker that gave its first token, and its kind; several choices may name
several."""

_ENDED_REMEDY = "Ask while it waits or runs; the log has a line of each that has ended."


@dataclass(slots=True)
class Try:
    """One try at a replica. Times are monotonic seconds, ``None`` for what was not reached."""

    asked_at: float
    replica: Replica | None = None
    placed_at: float | None = None
    first_at: float | None = None
    ended_at: float | None = None
    code: str | None = None  # of the error that ended it

    def placed(self, replica: Replica, at: float) -> None:
        self.replica = replica
        self.placed_at = at

    def ended(self, at: float, code: str | None = None) -> None:
        self.ended_at = at
        self.code = code

    def waited_s(self, now: float) -> float:
        """The wait for a slot, up to ``now`` if it lasts."""
        return (
            next(t for t in (self.placed_at, self.ended_at, now) if t is not None) - self.asked_at
        )


@dataclass(frozen=True, slots=True)
class Asker:
    """Whoever sent a request, as far as its account is concerned."""

    caller: Caller
    path: str
    headers: Headers  # the request's, for the context of a trace
    reply: list[tuple[bytes, bytes]] = field(default_factory=list)  # the answer's, until it begins

    @classmethod
    def of(cls, scope: Scope) -> Asker:
        """The sender of a request that the gate has let in."""
        return cls(scope["state"].get("caller", NOBODY), scope["path"], scope["headers"])


@dataclass(slots=True)
class Account:
    """One request, from its admission on."""

    request: GenerateRequest
    request_id: str
    asker: Asker
    begun_at: float
    trace: Trace | None
    demand: Demand
    tries: list[Try] = field(default_factory=list)
    ttft_s: float | None = None
    outcome: str = "cancelled"
    terminal: Terminal | None = None
    chunks: int = 0  # that were relayed

    @property
    def tokens(self) -> int:
        """Of the prompt and the answer; of an answer without an end, those at least that came,
        and the prompt as placement counts it."""
        if isinstance(self.terminal, Finished):
            return self.terminal.prompt_tokens + self.terminal.completion_tokens
        return 0 if self.ttft_s is None else self.chunks + round(prompt_work(self.request))

    @property
    def context_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """What makes the worker's spans a part of this trace."""
        return () if self.trace is None else self.trace.headers

    @property
    def replica(self) -> Replica | None:
        """The last one it was placed at."""
        return next((t.replica for t in reversed(self.tries) if t.replica), None)

    def waited_s(self, now: float) -> float:
        """The wait for a slot, all tries together."""
        return sum(attempt.waited_s(now) for attempt in self.tries)

    def begin_try(self, at: float) -> Try:
        self.tries.append(Try(at))
        return self.tries[-1]


class Accounts:
    """Opens and closes the accounts of requests; those refused at the door have none."""

    def __init__(
        self, metrics: Metrics, clock: Callable[[], float], tracer: Tracer | None = None
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._tracer = tracer
        self._live: dict[str, Account] = {}

    def open(
        self, request: GenerateRequest, request_id: str, asker: Asker, demand: Demand
    ) -> Account:
        """The account of a request; always ``close`` it."""
        now = self._clock()
        trace = None if self._tracer is None else self._tracer.begin(asker.headers, now)
        account = Account(request, request_id, asker, now, trace, demand)
        self._live[request_id] = account
        return account

    def live(self, request_id: str, caller: Caller) -> Account:
        """The account of a request that has not ended.

        Raises:
            NotFound: there is none, or it is another caller's.
        """
        account = self._live.get(request_id)
        if account is None or not (caller.operator or account.asker.caller.name == caller.name):
            raise NotFound(f"No request {request_id!r} is being served.", remedy=_ENDED_REMEDY)
        return account

    def first(self, account: Account, attempt: Try) -> ModelFigures:
        """The first event is here: the time to first token is known."""
        figures = self._metrics.of(account.request.model)
        attempt.first_at = self._clock()
        account.ttft_s = attempt.first_at - account.begun_at
        figures.ttft_s.observe(account.ttft_s)
        if attempt.replica is not None:
            account.asker.reply.extend(
                [
                    (WORKER_HEADER, _printable(attempt.replica.worker_id)),
                    (KIND_HEADER, _printable(attempt.replica.status.kind)),
                ]
            )
        return figures

    def retried(self) -> None:
        """A request whose replica was lost before its first event is placed again."""
        self._metrics.retried()

    def refused(self, error: TandemError, request_id: str, asker: Asker) -> None:
        """A request turned away at the door: its body or its key is not right."""
        self._metrics.refused(error.code)
        log.info(
            "refused",
            extra={
                "request_id": request_id,
                "outcome": error.code,
                "status": error.status,
                "path": asker.path,
                "key": asker.caller.name,
            },
        )
        if self._tracer is not None:
            now = self._clock()
            attributes = {"tandem.request_id": request_id, "tandem.outcome": error.code}
            attributes["url.path"] = asker.path
            self._tracer.begin(asker.headers, now).end("refused", now, attributes, error.code)

    def close(self, account: Account) -> None:
        """Figures, the one log line, and the spans of a request that has ended."""
        if self._live.get(account.request_id) is account:  # ids may be chosen twice
            del self._live[account.request_id]
        now = self._clock()
        finished = account.terminal if isinstance(account.terminal, Finished) else None
        if finished is not None:
            account.outcome = finished.reason
        elif isinstance(account.terminal, Failed):
            account.outcome = account.terminal.error().code  # one of ours, whatever they wrote
        last = account.tries[-1]
        last.ended(last.ended_at or now, last.code or _error_code(account))
        waited_s = account.waited_s(now)
        duration_s = now - account.begun_at
        account.asker.caller.charge(account.tokens)
        figures = self._metrics.of(account.request.model)
        figures.e2e_s.observe(duration_s)
        figures.queue_s.observe(waited_s)
        self._metrics.ended(account.request.model, account.outcome, finished)
        replica = account.replica
        log.info(
            "finished",
            extra={
                "request_id": account.request_id,
                "model": account.request.model,
                "key": account.asker.caller.name,
                "worker_id": replica.worker_id if replica else None,
                "kind": replica.status.kind if replica else None,
                "outcome": account.outcome,
                "waited_s": waited_s,
                "ttft_s": account.ttft_s,
                "duration_s": duration_s,
                "prompt_tokens": finished.prompt_tokens if finished else None,
                "cached_tokens": finished.cached_tokens if finished else None,
                "tokens": finished.completion_tokens if finished else None,
                "tries": len(account.tries),
            },
        )
        if account.trace is not None:
            _tell(account, account.trace, now, self._metrics.label(account.request.model))


def _printable(text: str) -> bytes:
    """Fit for a header, whatever a worker says of itself."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text).encode()


def _error_code(account: Account) -> str | None:
    """The error that ended the request; being cancelled by its client is none."""
    finished = isinstance(account.terminal, Finished)
    return None if finished or account.outcome == "cancelled" else account.outcome


# ---------------------------------------------------------------- the trace


def _tell(account: Account, trace: Trace, now: float, label: str) -> None:
    for number, attempt in enumerate(account.tries, 1):
        _tell_try(trace, attempt, number)
    operation = "chat" if account.request.messages is not None else "text_completion"
    finished = account.terminal if isinstance(account.terminal, Finished) else None
    replica = account.replica
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": account.request.model,
        "gen_ai.request.max_tokens": account.request.max_new_tokens,
        "gen_ai.response.finish_reasons": (finished.reason,) if finished else None,
        "gen_ai.response.time_to_first_chunk": account.ttft_s,
        "gen_ai.usage.input_tokens": finished.prompt_tokens if finished else None,
        "gen_ai.usage.output_tokens": finished.completion_tokens if finished else None,
        "tandem.cached_tokens": finished.cached_tokens if finished else None,
        "tandem.request_id": account.request_id,
        "tandem.outcome": account.outcome,
        "tandem.worker_id": replica.worker_id if replica else None,
        "tandem.worker_kind": replica.status.kind if replica else None,
        "tandem.tries": len(account.tries),
    }
    trace.end(f"{operation} {label}", now, attributes, _error_code(account))


def _tell_try(trace: Trace, attempt: Try, number: int) -> None:
    """``queue``, ``prefill`` and ``decode`` of one try, as far as it came."""
    assert attempt.ended_at is not None
    attributes: Attributes = {
        "tandem.try": number,
        "tandem.worker_id": attempt.replica.worker_id if attempt.replica else None,
    }
    begun = {"queue": attempt.asked_at, "prefill": attempt.placed_at, "decode": attempt.first_at}
    trace.phases(begun, attempt.ended_at, attributes, attempt.code)
