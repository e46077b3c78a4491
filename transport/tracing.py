"""OpenTelemetry traces: one span a request, one below it for each of its phases.

Off unless ``--otlp-endpoint`` is given, and then nothing of OpenTelemetry is imported here. A
request's phases are told when it has ended, with the times they had, so that a token costs
nothing. Spans go out in batches from a thread of their own; a collector that is away costs spans,
never a request. Attributes are OpenTelemetry's for generative AI where it has one, ours
(``tandem.*``) where not; never prompts or answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from anyio import move_on_after, to_thread

from protocol.version import VERSION
from transport.exits import usage_error

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExportResult
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]
Attributes: TypeAlias = Mapping[str, str | int | float | Sequence[str] | None]
"""Of a span; those that are ``None`` are left out."""

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_EXPORT_TIMEOUT_S = 5
_FLUSH_S = 2.0  # the most a process that stops spends on its last spans


async def connect(endpoint: str | None, *, service: str, instance: str) -> Tracer | None:
    """A tracer that sends to ``endpoint``; ``None``, and nothing done, without one.

    A process that lacks the libraries ends with a sentence and exit code 2.
    """
    if endpoint is None:
        return None
    try:
        # In a thread: the first import reads hundreds of files.
        return await to_thread.run_sync(partial(_connected, endpoint, service, instance))
    except ModuleNotFoundError as exc:
        usage_error(
            f"--otlp-endpoint needs OpenTelemetry, and {exc.name} is not installed: "
            "pip install '.[otel]'."
        )


def _connected(endpoint: str, service: str, instance: str) -> Tracer:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create(
        {"service.name": service, "service.instance.id": instance, "service.version": VERSION}
    )
    # Its own words come once a batch, or once a span; _Exporter says it once.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    exporter = _Exporter(
        OTLPSpanExporter(traces_url(endpoint), timeout=_EXPORT_TIMEOUT_S), endpoint
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(cast(Any, exporter)))
    return Tracer(provider, exporter)


def traces_url(endpoint: str) -> str:
    """Where spans go at a collector: OTLP's path below its address, unless it is there already."""
    bare = endpoint.rstrip("/")
    return bare if bare.endswith("/v1/traces") else f"{bare}/v1/traces"


class Tracer:
    """Makes the traces of one process; always ``aclose`` it."""

    def __init__(self, provider: TracerProvider, exporter: _Exporter) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation import tracecontext

        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("tandem", VERSION)
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._nothing = Context()  # never the one that happens to be current
        self._within = trace.set_span_in_context
        self._server = trace.SpanKind.SERVER
        self.error = trace.StatusCode.ERROR

    def begin(self, headers: Headers, begun_at: float) -> Trace:
        """The trace of a request that came with ``headers`` at monotonic ``begun_at``.

        It belongs to the caller's trace when they have a W3C ``traceparent``.
        """
        given = {
            name.decode(): value.decode("latin-1")
            for name, value in headers
            if name in _CONTEXT_HEADERS
        }
        parent = self._propagator.extract(given, self._nothing)
        offset_ns = time.time_ns() - time.monotonic_ns()
        start_time = offset_ns + int(begun_at * 1e9)
        span = self._tracer.start_span("request", parent, self._server, start_time=start_time)
        passed_on: dict[str, str] = {}
        self._propagator.inject(passed_on, self._within(span, self._nothing))
        return Trace(self, span, offset_ns, passed_on)

    def phase(self, span: Span, name: str, start_time: int) -> Span:
        """A span below ``span``."""
        return self._tracer.start_span(
            name, self._within(span, self._nothing), start_time=start_time
        )

    async def aclose(self) -> None:
        """Send what is left, within two seconds; harmless when repeated."""
        with move_on_after(_FLUSH_S, shield=True):
            await to_thread.run_sync(self._provider.shutdown, abandon_on_cancel=True)
        self._exporter.give_up()


class Trace:
    """One request's span and those below it; all times are monotonic seconds.

    ``headers`` carry its context on to the next process.
    """

    def __init__(
        self, tracer: Tracer, span: Span, offset_ns: int, passed_on: Mapping[str, str]
    ) -> None:
        self._tracer = tracer
        self._offset_ns = offset_ns  # from the monotonic clock to Unix time
        self._span = span
        self.headers = tuple((k.encode(), v.encode("latin-1")) for k, v in passed_on.items())

    def phases(
        self,
        begun: Mapping[str, float | None],
        ended_at: float,
        attributes: Attributes,
        code: str | None = None,
    ) -> None:
        """Tell of phases that followed each other: when each began, ``None`` for one that was not
        reached, and when the last one ended, by the error ``code`` if there is one."""
        if not self._span.is_recording():
            return
        reached = [(name, at) for name, at in begun.items() if at is not None]
        for (name, begun_at), (_, next_at) in pairwise([*reached, ("", ended_at)]):
            span = self._tracer.phase(self._span, name, self._unix_ns(begun_at))
            ended_by = code if name == reached[-1][0] else None
            self._close(span, next_at, attributes, ended_by)

    def end(
        self, name: str, ended_at: float, attributes: Attributes, code: str | None = None
    ) -> None:
        """The request has ended; nothing may be told of it any more."""
        self._span.update_name(name)
        self._close(self._span, ended_at, attributes, code)

    def _close(self, span: Span, ended_at: float, attributes: Attributes, code: str | None) -> None:
        span.set_attributes({k: v for k, v in attributes.items() if v is not None})
        if code is not None:
            span.set_attribute("error.type", code)
            span.set_status(self._tracer.error, code)
        span.end(self._unix_ns(ended_at))

    def _unix_ns(self, at: float) -> int:
        return self._offset_ns + int(at * 1e9)


class _Exporter:
    """OTLP's exporter, saying once that it fails and once that it works again."""

    def __init__(self, inner: Any, endpoint: str) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._failing = self._given_up = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        from opentelemetry.sdk.trace.export import SpanExportResult

        if self._given_up:
            return SpanExportResult.FAILURE
        result: SpanExportResult = self._inner.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            log.warning("traces cannot be sent and are dropped", extra={"address": self._endpoint})
        elif self._failing and not failing:
            log.info("traces are sent again", extra={"address": self._endpoint})
        self._failing = failing
        return result

    def give_up(self) -> None:
        """The process ends: whoever waits to send waits no longer."""
        self._given_up = True
        self.shutdown()

    def shutdown(self) -> None:
        self._inner.shutdown()
