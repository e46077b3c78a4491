"""Images by address: off by default, and then from the named hosts only."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.cluster.conftest import Cluster, Running
from tests.pictures import encoded, picture
from transport import process
from transport.addresses import address_of

CHAT = "/v1/chat/completions"
PNG = base64.b64decode(encoded(picture()))


class Site:
    """A web server that has an image, and other things."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.hanging = asyncio.Event()
        self.left = asyncio.Event()
        routes = {
            "/a.png": self._image,
            "/page": self._page,
            "/big": self._big,
            "/hang": self._hang,
            "/to": self._redirect,
        }
        self.app = Starlette(routes=[Route(path, answer) for path, answer in routes.items()])
        self.address = ""

    async def _image(self, request: Request) -> Response:
        self.asked.append(request.headers["host"])
        return Response(PNG, media_type="image/png")

    async def _page(self, request: Request) -> Response:
        return Response("<html>", media_type="text/html")

    async def _big(self, request: Request) -> Response:
        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 65536

        return StreamingResponse(endless(), media_type="image/png")

    async def _hang(self, request: Request) -> Response:
        self.hanging.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        return Response()

    async def _redirect(self, request: Request) -> Response:
        return RedirectResponse(request.query_params["where"])


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    sock = process.bind("127.0.0.1", 0)
    site.address = address_of(sock)
    server = process.Server(site.app, sock, grace_s=1)
    await server.start()
    try:
        yield site
    finally:
        await server.kill()


Ask = Callable[[str], Awaitable[httpx.Response]]


async def asking(cluster: Cluster, *hosts: str, **settings: Any) -> tuple[Running, Ask]:
    controller = await cluster.controller(image_url_host=hosts, **settings)
    await cluster.worker(controller)

    async def ask(url: str) -> httpx.Response:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What is it?"},
        ]
        asked = {"model": "echo", "messages": [{"role": "user", "content": content}], "n": 2}
        return await cluster.client(controller).post(CHAT, json=asked)

    return controller, ask


def message(response: httpx.Response, code: str) -> str:
    error = response.json()["error"]
    assert error["code"] == code, error
    assert response.status_code != 200
    found: str = error["message"]
    return found


async def test_a_named_host_is_asked_once(cluster: Cluster, site: Site) -> None:
    _, ask = await asking(cluster, "127.0.0.1")
    answer = await ask(f"{site.address}/a.png")
    assert answer.json()["choices"][1]["message"]["content"] == "What is it?"
    assert site.asked == [site.address.removeprefix("http://")]


async def test_by_name_it_is_asked_by_that_name(cluster: Cluster, site: Site) -> None:
    _, ask = await asking(cluster, "localhost")
    port = site.address.rpartition(":")[2]
    assert (await ask(f"http://localhost:{port}/a.png")).status_code == 200
    assert site.asked == [f"localhost:{port}"]


async def test_nothing_is_fetched_unless_switched_on(cluster: Cluster, site: Site) -> None:
    _, ask = await asking(cluster)
    assert "fetches no addresses" in message(await ask(f"{site.address}/a.png"), "unsupported")
    assert not site.asked


@pytest.mark.parametrize("hosts", [("*",), ("*.0.0.1",), ("example.org",)], ids=str)
async def test_an_address_inside_is_refused(
    cluster: Cluster, site: Site, hosts: tuple[str, ...]
) -> None:
    _, ask = await asking(cluster, *hosts)
    message(await ask(f"{site.address}/a.png"), "forbidden")
    assert not site.asked


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("{site}/a.png", "is an address inside"),  # though 127.0.0.1 is named: not by redirect
        ("http://169.254.169.254/latest/meta-data/", "not fetched from '169.254.169.254'"),
        ("http://[::1]/a.png", "not fetched from '::1'"),
        ("file:///etc/passwd", "not http"),
    ],
)
async def test_redirects_inside_are_refused(
    cluster: Cluster, site: Site, where: str, words: str
) -> None:
    _, ask = await asking(cluster, "127.0.0.1")
    target = where.format(site=site.address)
    response = await ask(f"{site.address}/to?where={target}")
    assert words in response.json()["error"]["message"]
    assert response.status_code in (403, 422)
    assert not site.asked


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/none", "bad_image", "status 404"),
        ("/page", "bad_image", "is text/html, not an image"),
        ("/big", "too_large", "more than 100000 bytes"),
    ],
)
async def test_what_is_no_image(
    cluster: Cluster, site: Site, path: str, code: str, words: str
) -> None:
    _, ask = await asking(cluster, "127.0.0.1", max_image_bytes=100_000)
    assert words in message(await ask(f"{site.address}{path}"), code)


async def test_nobody_there(cluster: Cluster) -> None:
    _, ask = await asking(cluster, "127.0.0.1")
    address = f"http://127.0.0.1:{process.free_port()}/secret.png?key=abc"
    found = message(await ask(address), "bad_image")
    assert "could not be fetched" in found
    assert "abc" not in found


async def test_one_who_leaves_ends_the_fetching(cluster: Cluster, site: Site) -> None:
    controller, ask = await asking(cluster, "127.0.0.1")
    waiting = asyncio.ensure_future(ask(f"{site.address}/hang"))
    async with asyncio.timeout(5):
        await site.hanging.wait()
        waiting.cancel()
        await site.left.wait()
    await cluster.wait_quiet(controller)
