"""A controller that speaks https, with a worker and a client that believe its certificate."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx
import pytest

from controller.__main__ import serve
from controller.settings import ControllerSettings
from tests import certificate
from tests.cluster.conftest import PATH, SSE, Cluster, Running, Stop, until
from transport.process import free_port
from workers.echo.engine import EchoEngine
from workers.echo.settings import EchoSettings
from workers.runner import _Worker


async def test_https_end_to_end(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = await asyncio.to_thread(certificate.make, tmp_path, password="open sesame")
    settings = ControllerSettings(
        port=free_port(),
        ssl_certfile=files.certificate,
        ssl_keyfile=files.key,
        ssl_keyfile_password="open sesame",  # type: ignore[arg-type]
    )
    address = f"https://127.0.0.1:{settings.port}"
    trusting = ssl.create_default_context(cafile=files.certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(files.certificate))
    stop = Stop()
    controller = asyncio.create_task(serve(settings, stop))  # type: ignore[arg-type]
    made = EchoSettings(port=free_port(), controller_address=(address + "/",), worker_id="one")
    worker = asyncio.create_task(_Worker(made, EchoEngine(made)).run(Stop()))  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(base_url=address, verify=trusting, trust_env=False) as client:

            async def listed() -> bool:
                for task in (controller, worker):
                    assert not task.done(), task.result()
                workers = (await client.get("/cluster")).json()["workers"]
                return [w["state"] for w in workers] == ["ready"]

            await until(listed)
            response = await client.post(PATH, json={"model": "echo", "prompt": "a"}, headers=SSE)
            assert b"event: finished" in response.content
            page = {"origin": address}  # its own
            assert (await client.get("/v1/models", headers=page)).status_code == 200
        plain = cluster.client(Running(settings.port, controller, stop))
        with pytest.raises(httpx.HTTPError):
            await plain.get("/healthz")
    finally:
        for task in (worker, controller):
            task.cancel()
        await asyncio.gather(worker, controller, return_exceptions=True)


async def test_a_worker_that_does_not_believe_the_certificate_says_so(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = await asyncio.to_thread(certificate.make, tmp_path)
    port = free_port()
    settings = ControllerSettings(port=port, ssl_certfile=files.certificate, ssl_keyfile=files.key)
    stop = Stop()
    controller = asyncio.create_task(serve(settings, stop))  # type: ignore[arg-type]
    made = EchoSettings(port=free_port(), controller_address=(f"https://127.0.0.1:{port}",))
    worker = asyncio.create_task(_Worker(made, EchoEngine(made)).run(Stop()))  # type: ignore[arg-type]
    try:

        async def complained() -> bool:
            return "CERTIFICATE_VERIFY_FAILED" in caplog.text

        await until(complained)
    finally:
        for task in (worker, controller):
            task.cancel()
        await asyncio.gather(worker, controller, return_exceptions=True)
