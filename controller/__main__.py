"""Start the controller: ``python -m controller --port 21001``.

Workers register themselves (``python -m workers.hf``, ``python -m workers.sglang``); clients send
LLaVA's requests to ``/worker_generate_stream`` or OpenAI's to ``/v1/chat/completions``.
``GET /cluster`` shows who is there, ``/metrics`` how it goes. ``python -m controller keys`` makes
API keys.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
import time

from controller import access, callers, keys_command
from controller.accounts import Accounts
from controller.aggregate import aggregate
from controller.app import Controller, create_app
from controller.dispatch import Dispatcher
from controller.fetch import ImageFetcher
from controller.generation import Generator
from controller.intake import Intake
from controller.liveness import Liveness
from controller.metrics import Metrics
from controller.policy import POLICIES
from controller.questions import Questions
from controller.registry import MembershipEvent, Registry
from controller.settings import ControllerSettings
from controller.streams import Serving
from transport import credentials, process, tracing
from transport.addresses import address_of, bare
from transport.client import HttpPool
from transport.membership import Membership
from transport.settings import parse

log = logging.getLogger("controller")


def main() -> None:
    if sys.argv[1:2] == ["keys"]:
        raise SystemExit(keys_command.main(sys.argv[2:]))
    settings = parse(ControllerSettings)
    gc.collect()
    gc.freeze()  # modules stay: a full collection that walks them stalls every stream for 70 ms
    process.run(lambda stop: serve(settings, stop))


def wire(
    settings: ControllerSettings,
    controller_id: str,
    intake: Intake,
    tracer: tracing.Tracer | None = None,
) -> tuple[Controller, HttpPool]:
    """Make the parts and join them; needs a running event loop."""
    epoch = time.time_ns()
    registry = Registry(
        clock=time.monotonic,
        ttl_s=settings.expiry_s,
        on_change=lambda: on_change(),
        on_event=_log_event,
    )
    dispatcher = Dispatcher(
        registry,
        POLICIES[settings.dispatch_method],
        random=random.Random(),
        clock=time.monotonic,
        max_waiting=settings.max_waiting,
        max_waiting_bytes=settings.max_waiting_bytes,
        max_wait_s=settings.max_wait_s,
    )
    to_workers = credentials.headers(settings.cluster_token)
    liveness = Liveness(
        registry,
        ttl_s=settings.expiry_s,
        heartbeat_s=settings.heartbeat_s,
        headers=to_workers,
    )

    def on_change() -> None:
        liveness.rewatch()
        dispatcher.wake()

    pool = HttpPool(
        connect_timeout_s=settings.connect_timeout_s,
        headers=[(name.encode(), value.encode()) for name, value in to_workers.items()],
    )
    metrics = Metrics(registry, dispatcher, time.monotonic)
    accounts = Accounts(metrics, time.monotonic, tracer)
    serving = Serving(
        max_body_bytes=settings.max_body_bytes,
        intake=intake,
        fetcher=ImageFetcher(
            settings.image_url_host,
            max_bytes=settings.max_image_bytes,
            max_total_bytes=settings.max_body_bytes,
        ),
        generator=Generator(settings, dispatcher, liveness, pool, accounts, time.monotonic),
        accounts=accounts,
    )
    controller = Controller(
        settings=settings,
        registry=registry,
        liveness=liveness,
        dispatcher=dispatcher,
        serving=serving,
        metrics=metrics,
        questions=Questions(registry, liveness, pool),
        clock=time.monotonic,
        status=lambda: aggregate(registry, worker_id=controller_id, epoch=epoch),
    )
    return controller, pool


def _log_event(event: MembershipEvent) -> None:
    level = logging.WARNING if event.what in {"lost", "expired"} else logging.INFO
    fields = {"worker_id": event.worker_id, "address": event.address, "reason": event.reason}
    log.log(level, event.what, extra={k: v for k, v in fields.items() if v})


async def serve(settings: ControllerSettings, stop: process.StopSignal) -> int:
    """Serve until a signal, then finish what runs; returns the exit code."""
    intake = Intake(settings.max_images, settings.max_tokens, settings.aliases)
    ring = await access.prepare(settings, intake.resolve)
    sock = process.bind(settings.host, settings.port)
    scheme = "http" if settings.tls is None else "https"
    address = settings.own_address or address_of(sock, scheme=scheme)
    controller_id = f"controller-{sock.getsockname()[1]}"
    tracer = await tracing.connect(
        settings.otlp_endpoint, service="tandem-controller", instance=controller_id
    )
    controller, pool = wire(settings, controller_id, intake, tracer)
    app = access.guarded(create_app(controller), settings, ring, controller.serving.accounts)
    server = process.Server(app, sock, grace_s=settings.drain_timeout_s, tls=settings.tls)
    await server.start()
    log.info("listening", extra={"address": bare(address)})
    memberships = [
        Membership(upstairs, address, controller.status, token=settings.cluster_token)
        for upstairs in settings.register_at
    ]
    tasks = [asyncio.create_task(controller.liveness.run())]
    tasks += [asyncio.create_task(membership.run()) for membership in memberships]
    if settings.api_key_file is not None and ring is not None:
        tasks.append(asyncio.create_task(callers.follow(settings.api_key_file, ring)))
    try:
        await stop.wait()
        log.info("draining")
        controller.dispatcher.close()
        await process.first_of(server.stop(), stop.wait_impatient())
        return 0
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.kill()
        await controller.liveness.aclose()
        await controller.serving.fetcher.aclose()
        pool.close()
        if tracer is not None:
            await tracer.aclose()


if __name__ == "__main__":
    main()
