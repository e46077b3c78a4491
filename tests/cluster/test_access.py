"""Who may do what, at a real controller and its workers."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from controller import keys
from controller.keys import ApiKey, KeyFile
from protocol.events import Finished
from tests.cluster.conftest import PATH, SSE, Cluster, Running, ask, until

TOKEN = "the-token-of-this-cluster"
BEARER = {"authorization": f"Bearer {TOKEN}"}
ASKED = {"model": "echo", "prompt": "hello"}
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


class Site:
    """A controller with a token and keys, and clients of it."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.cluster = cluster
        self.file = folder / "keys.json"
        self._clients: list[httpx.AsyncClient] = []
        self._known: tuple[ApiKey, ...] = ()

    async def key(self, name: str, **limits: Any) -> str:
        """Add a key to the file."""
        key, entry = keys.mint(name, **limits)
        await self.write(*self._known, entry)
        return key

    async def write(self, *entries: ApiKey) -> None:
        self._known = entries
        await asyncio.to_thread(keys.save, self.file, KeyFile(keys=entries))

    async def controller(self, **settings: Any) -> Running:
        await self.write(*self._known)
        defaults: dict[str, Any] = {"cluster_token": TOKEN, "api_key_file": self.file}
        running = await self.cluster.controller(**defaults | settings)
        self.cluster.client(running).headers.update(BEARER)
        return running

    def client(
        self, running: Running, credential: str | None = None, **headers: str
    ) -> httpx.AsyncClient:
        if credential is not None:
            headers["authorization"] = f"Bearer {credential}"
        made = httpx.AsyncClient(base_url=running.address, headers=headers, trust_env=False)
        self._clients.append(made)
        return made

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()


@pytest.fixture
async def site(tmp_path: Path, cluster: Cluster) -> AsyncIterator[Site]:
    site = Site(tmp_path, cluster)
    try:
        yield site
    finally:
        await site.aclose()


def error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a refusal, which is whole in every respect."""
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["code"] == code
    assert found["message"]
    assert found["remedy"]
    assert response.headers["x-request-id"]
    secure(response)
    return found


def secure(response: httpx.Response) -> None:
    for name, value in {
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }.items():
        assert response.headers.get_list(name) == [value]


# ---------------------------------------------------------------- keys


async def test_clients_need_a_key(site: Site) -> None:
    key = await site.key("ann")
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    for path, body in ((PATH, ASKED), ("/v1/chat/completions", CHAT), ("/list_models", {})):
        for credential in (None, "tdm-wrong", TOKEN + "x"):
            response = await site.client(controller, credential).post(path, json=body)
            error(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"] == "Bearer"
        for credential in (key, TOKEN):
            response = await site.client(controller, credential).post(path, json=body)
            assert response.status_code == 200, response.text
            secure(response)
    basic = base64.b64encode(f"any:{key}".encode()).decode()
    for headers in ({"x-api-key": key}, {"authorization": f"Basic {basic}"}):
        assert (await site.client(controller, **headers).get("/v1/models")).status_code == 200


async def test_a_refusal_comes_before_the_body_is_read(site: Site) -> None:
    controller = await site.controller()
    reader, writer = await asyncio.open_connection("127.0.0.1", controller.port)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            b"content-length: 1000000\r\nx-request-id: mine\r\n\r\n{"
        )
        head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()
    assert head.startswith(b"HTTP/1.1 401")
    assert b"x-request-id: mine" in head


async def test_a_key_opens_no_operators_route(site: Site) -> None:
    key = await site.key("ann")
    controller = await site.controller()
    for method, path in (
        ("GET", "/cluster"),
        ("GET", "/metrics"),
        ("POST", "/workers/a/drain"),
        ("POST", "/register_worker"),
        ("POST", "/receive_heart_beat"),
    ):
        with_key = await site.client(controller, key).request(method, path, json={})
        error(with_key, 403, "forbidden")
        without = await site.client(controller).request(method, path, json={})
        assert "TANDEM_CLUSTER_TOKEN" in error(without, 401, "unauthenticated")["remedy"]


async def test_models_of_a_key(site: Site) -> None:
    only = await site.key("only", models=("echo",))
    other = await site.key("other", models=("llava",))
    controller = await site.controller(alias=("gpt-4=echo",))
    await site.cluster.worker(controller, cluster_token=TOKEN)
    for path, fields in ((PATH, {"prompt": "a"}), ("/v1/chat/completions", {})):
        for model in ("echo", "gpt-4"):
            body = (CHAT if not fields else ASKED) | {"model": model}
            found = await site.client(controller, only).post(path, json=body, headers=SSE)
            assert found.status_code == 200, found.text
            refused = await site.client(controller, other).post(path, json=body, headers=SSE)
            assert error(refused, 403, "forbidden")["param"] == "model"
    names = {"model": "echo"}
    error(
        await site.client(controller, other).post("/get_worker_address", json=names),
        403,
        "forbidden",
    )
    for key, known in ((only, ["echo", "gpt-4"]), (other, [])):
        client = site.client(controller, key)
        assert (await client.post("/list_models")).json()["models"] == known
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == known
    assert (await site.client(controller, other).get("/v1/models/echo")).status_code == 404


async def test_requests_a_minute(site: Site) -> None:
    key = await site.key("ann", requests_per_minute=2)
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    client = site.client(controller, key)
    for _ in range(5):
        assert (await client.post("/list_models")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
    for path, body in ((PATH, ASKED), ("/v1/chat/completions", CHAT)):
        assert (await client.post(path, json=body)).status_code == 200
    response = await client.post(PATH, json=ASKED)
    found = error(response, 429, "rate_limited")
    assert "'ann'" in found["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert (await site.client(controller, TOKEN).post(PATH, json=ASKED)).status_code == 200


async def test_tokens_a_minute(site: Site) -> None:
    key = await site.key("ann", tokens_per_minute=10)
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    client = site.client(controller, key)
    finished = (await ask(client, prompt="x" * 20))[-1]
    assert isinstance(finished, Finished)
    used = finished.prompt_tokens + finished.completion_tokens
    assert used > 20
    response = await client.post("/v1/chat/completions", json=CHAT)
    error(response, 429, "rate_limited")
    wait_s = (used - 10) * 6  # until the debt is paid
    assert wait_s - 5 <= int(response.headers["retry-after"]) <= wait_s + 7


async def test_an_answer_that_its_client_left_is_paid_for(site: Site) -> None:
    key = await site.key("ann", tokens_per_minute=5)
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN, delay_s=0.005)
    client = site.client(controller, key)
    asked = {"model": "echo", "prompt": "x" * 400}
    async with client.stream("POST", PATH, json=asked, headers=SSE) as response:
        assert response.status_code == 200
        await anext(response.aiter_raw())

    async def paid() -> bool:
        return (await client.post(PATH, json=ASKED)).status_code == 429

    await until(paid)


async def test_the_log_line_of_a_request_names_its_key(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    key = await site.key("ann")
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    with caplog.at_level(logging.DEBUG):
        await ask(site.client(controller, key), prompt="a")
        error(
            await site.client(controller, "tdm-wrong").post(PATH, json=ASKED),
            401,
            "unauthenticated",
        )
    lines = [r for r in caplog.records if r.name == "controller.accounts"]
    assert [getattr(line, "key", None) for line in lines] == ["ann", None]
    assert [getattr(line, "outcome", None) for line in lines] == ["stop", "unauthenticated"]
    whole = "\n".join(str(record.__dict__) for record in caplog.records)
    for secret in (key, TOKEN, "tdm-wrong"):
        assert secret not in whole


async def test_what_the_gate_refuses_is_counted(site: Site) -> None:
    key = await site.key("ann", requests_per_minute=1, models=("other",))
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    await site.client(controller, "tdm-wrong").post(PATH, json=ASKED)
    error(await site.client(controller, key).post(PATH, json=ASKED), 403, "forbidden")
    error(await site.client(controller, key).post(PATH, json=ASKED), 429, "rate_limited")
    # What is no request for an answer is none of them.
    await site.client(controller, "tdm-wrong").get("/v1/models")
    await site.client(controller, "tdm-wrong").post("/list_models")
    await site.client(controller, "tdm-wrong").post("/invented")
    found = (await site.cluster.client(controller).get("/metrics")).text
    assert set(re.findall(r"tandem_requests_total(\{.*)", found)) == {
        '{model="unknown",outcome="unauthenticated"} 1.0',
        '{model="unknown",outcome="forbidden"} 1.0',
        '{model="unknown",outcome="rate_limited"} 1.0',
    }


async def test_a_changed_key_file_is_noticed(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    first = await site.key("ann")
    controller = await site.controller()

    async def answers(key: str, status: int) -> bool:
        return (await site.client(controller, key).get("/v1/models")).status_code == status

    assert await answers(first, 200)
    second = await site.key("bob")
    await until(lambda: answers(second, 200), timeout_s=5)
    site.file.write_text("{ not a key file")

    async def complained() -> bool:
        return "the old API keys stay valid" in caplog.text

    await until(complained, timeout_s=5)
    assert await answers(second, 200)
    await site.write()
    await until(lambda: answers(first, 401), timeout_s=5)
    os.unlink(site.file)
    assert await answers(second, 401)


# ---------------------------------------------------------------- the token


async def test_a_worker_without_the_token_is_told_so(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    assert len((await site.cluster.state(controller))["workers"]) == 1
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await site.cluster.worker(controller)
    assert "not registered" in caplog.text
    assert "Send the TANDEM_CLUSTER_TOKEN of this cluster" in caplog.text
    assert len((await site.cluster.state(controller))["workers"]) == 1


async def test_a_worker_with_another_token_is_named_as_such(site: Site) -> None:
    controller = await site.controller()
    worker = await site.cluster.worker(cluster_token=TOKEN + "-of-another")
    response = await site.client(controller, TOKEN).post(
        "/register_worker", json={"worker_name": worker.address}
    )
    assert "TANDEM_CLUSTER_TOKEN is not that" in error(response, 422, "invalid_request")["message"]


async def test_draining_through_the_controller(site: Site) -> None:
    key = await site.key("ann")
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN, worker_id="one")
    for credential, status in ((None, 401), (key, 403), (TOKEN, 200)):
        response = await site.client(controller, credential).post("/workers/one/drain")
        assert response.status_code == status
    assert response.json()["state"] == "draining"


async def test_a_controller_above_another(site: Site) -> None:
    upper = await site.controller()
    lower = await site.controller(register_at=(upper.address,))
    await site.cluster.worker(lower, cluster_token=TOKEN)
    await site.cluster.wait_listed(upper, lower.address)
    assert (await ask(site.client(upper, TOKEN), prompt="hello"))[-1].type == "finished"


async def test_refresh_is_harmless_for_clients(site: Site) -> None:
    """LLaVA's and FastChat's clients begin with it."""
    key = await site.key("ann")
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    before = (await site.cluster.state(controller))["workers"][0]["heartbeat_age_s"]
    assert (await site.client(controller, key).post("/refresh_all_workers")).status_code == 200
    between = (await site.cluster.state(controller))["workers"][0]["heartbeat_age_s"]
    assert between > before
    assert (await site.client(controller, TOKEN).post("/refresh_all_workers")).status_code == 200
    after = (await site.cluster.state(controller))["workers"][0]["heartbeat_age_s"]
    assert after < between


async def test_without_a_token_only_this_machine_commands(cluster: Cluster) -> None:
    controller = await cluster.controller()
    await cluster.worker(controller, worker_id="one")
    client = cluster.client(controller)
    for headers in (
        {"x-forwarded-for": "203.0.113.9"},
        {"forwarded": "for=203.0.113.9"},
        {"x-real-ip": "203.0.113.9"},
        {"host": "tandem.example.org"},
    ):
        for method, path in (
            ("GET", "/cluster"),
            ("GET", "/metrics"),
            ("POST", "/workers/one/drain"),
            ("POST", "/register_worker"),
        ):
            response = await client.request(method, path, headers=headers, json={})
            assert "TANDEM_CLUSTER_TOKEN" in error(response, 403, "forbidden")["remedy"]
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert (await client.post("/workers/one/drain")).status_code == 200


# ---------------------------------------------------------------- browsers


async def test_pages_of_other_sites_are_refused(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    page = {"origin": "https://evil.example", "content-type": "text/plain"}
    client = cluster.client(controller)
    for path in (PATH, "/v1/chat/completions", "/list_models", "/workers/x/drain", "/nowhere"):
        response = await client.post(path, content=orjson.dumps(ASKED), headers=page)
        assert "--cors-origins" in error(response, 403, "forbidden")["remedy"]
        assert "access-control-allow-origin" not in response.headers
    error(await cluster.client(worker).post("/drain", headers=page), 403, "forbidden")
    assert (await client.get("/healthz", headers=page)).status_code == 200
    own = {"origin": controller.address}
    assert (await client.post(PATH, json=ASKED, headers=own)).status_code == 200
    preflight = page | {"access-control-request-method": "POST"}
    response = await client.options("/v1/models", headers=preflight)
    assert "access-control-allow-origin" not in response.headers


async def test_pages_of_named_origins(site: Site) -> None:
    key = await site.key("ann")
    controller = await site.controller(cors_origins=("https://chat.example.org",))
    await site.cluster.worker(controller, cluster_token=TOKEN)
    page = {"origin": "https://chat.example.org"}
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-lang",
    }
    nobody, ann = site.client(controller), site.client(controller, key)
    response = await nobody.options("/v1/chat/completions", headers=page | preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == page["origin"]
    assert "x-stainless-lang" in response.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in response.headers
    response = await ann.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=page)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == page["origin"]
    assert "X-Request-Id" in response.headers["access-control-expose-headers"]
    refused = await nobody.post("/v1/chat/completions", json=CHAT, headers=page)
    error(refused, 401, "unauthenticated")
    assert refused.headers["access-control-allow-origin"] == page["origin"]  # so that it is read
    evil = {"origin": "https://evil.example"}
    response = await nobody.options("/v1/models", headers=evil | preflight)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers
    error(await ann.post("/v1/chat/completions", json=CHAT, headers=evil), 403, "forbidden")


# ---------------------------------------------------------------- refusals


async def test_no_such_route_and_no_such_method(cluster: Cluster) -> None:
    controller = await cluster.controller()
    worker = await cluster.worker(controller)
    for running in (controller, worker):
        client = cluster.client(running)
        for path in ("/nowhere", "/docs", "/"):
            found = error(await client.get(path), 404, "not_found")
            assert path in found["message"]
        for method, path, allowed in (
            ("GET", PATH, "POST"),
            ("PUT", "/healthz", "GET"),
            ("GET", "/worker_get_status", "POST"),
        ):
            response = await client.request(method, path)
            error(response, 405, "method_not_allowed")
            assert response.headers["allow"] == allowed
    response = await cluster.client(worker).put("/adapters")
    assert response.headers["allow"] == "GET, POST"


async def test_bodies_of_control_routes_have_a_limit(site: Site) -> None:
    controller = await site.controller()
    client = site.client(controller, TOKEN)
    big = {"worker_name": "x" * (1 << 20)}
    for path in ("/register_worker", "/receive_heart_beat", "/get_worker_address"):
        error(await client.post(path, json=big), 413, "too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    error(await client.post("/register_worker", content=pieces()), 413, "too_large")
    error(await client.post("/register_worker", content=b"{"), 422, "invalid_request")


async def test_a_body_that_does_not_come(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.asgi.BODY_PAUSE_S", 0.1)
    controller = await cluster.controller()
    for path in (PATH, "/register_worker"):
        reader, writer = await asyncio.open_connection("127.0.0.1", controller.port)
        try:
            head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100\r\n\r\n{{"
            writer.write(head.encode())
            answer = await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.close()
            await writer.wait_closed()
        assert answer.startswith(b"HTTP/1.1 504"), path


async def test_ids_and_headers_are_on_every_answer(site: Site) -> None:
    key = await site.key("ann")
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN)
    ann = site.client(controller, key)
    given = {"x-request-id": "mine-1"}
    for method, path, body in (
        ("GET", "/healthz", None),
        ("GET", "/v1/models", None),
        ("GET", "/openapi.json", None),
        ("GET", "/nowhere", None),
        ("GET", "/cluster", None),
        ("GET", PATH, None),
        ("POST", PATH, ASKED),
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", CHAT | {"stream": True}),
        ("POST", "/v1/chat/completions", {}),
        ("POST", "/get_worker_address", {}),
    ):
        response = await ann.request(method, path, json=body, headers=given)
        assert response.headers.get_list("x-request-id") == ["mine-1"], path
        secure(response)
        minted = await ann.request(method, path, json=body)
        assert len(minted.headers["x-request-id"]) == 32, path


async def test_a_request_is_shown_to_its_sender_only(site: Site) -> None:
    ann, bob = await site.key("ann"), await site.key("bob")
    controller = await site.controller()
    await site.cluster.worker(controller, cluster_token=TOKEN, delay_s=0.05)
    client = site.client(controller, ann)
    asked = {"model": "echo", "prompt": "a long answer " * 40, "request_id": "hers"}
    async with client.stream("POST", PATH, json=asked, headers=SSE) as response:
        pieces = response.aiter_raw()  # held: its end would be the client's
        await anext(pieces)
        for presented, status in ((ann, 200), (bob, 404), (TOKEN, 200)):
            found = await site.client(controller, presented).get("/requests/hers")
            assert found.status_code == status, (presented, found.text)
