"""Images that clients name by address: fetched only from hosts the operator has named.

Off unless ``--image-url-host`` names a host. Each address, of a redirect too, has to be on that
list. It is resolved once, judged, and that very address is connected to, so that a name cannot
change its meaning in between. Private, loopback, link-local and reserved addresses (the cloud's
metadata service is one) are refused, unless the host was named outright and no redirect led there.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urljoin, urlsplit

import httpx

from protocol.errors import BadImage, Forbidden, TandemError, TooLarge, Unsupported
from transport.tasks import end

TIMEOUT_S = 10.0
"""For one image, redirects included."""

_REDIRECTS = 3
_AT_ONCE = 16  # for all requests together
_REMEDY = "Send the image itself as data:image/png;base64,... in image_url.url."


def is_address(image: str) -> bool:
    """Whether ``image`` says where an image is instead of being one."""
    return "://" in image[:16] and not image.startswith("data:")


class ImageFetcher:
    """Fetches images from ``hosts``: names, ``*.below.a.name``, or ``*`` for any public one."""

    def __init__(self, hosts: Sequence[str], *, max_bytes: int, max_total_bytes: int) -> None:
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._max_total_bytes = max_total_bytes  # of one request
        self._slots = asyncio.Semaphore(_AT_ONCE)
        # The judged address is connected to: neither a proxy nor httpx chooses another. And no
        # connection is used twice, as it is verified for one host and kept for one address.
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(connect=3, read=5, write=5, pool=5),
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    def check(self, images: Sequence[str]) -> bool:
        """Whether one of ``images`` is an address.

        Raises:
            Unsupported: one is, and nothing is fetched here.
            BadImage: it is not one of http or https.
            Forbidden: its host is not on the list.
        """
        addresses = [image for image in images if is_address(image)]
        for address in addresses:
            self._host(address)
        return bool(addresses)

    async def fetched(self, images: Sequence[str]) -> tuple[str, ...]:
        """``images`` with every address replaced by the image that is there.

        Raises:
            Unsupported, Forbidden, TooLarge, BadImage: one of them is not to be had.
        """
        total = 0

        async def one(image: str) -> str:
            nonlocal total
            if is_address(image):
                async with self._slots:
                    image = await self._fetch(image)
            total += len(image)
            if total > self._max_total_bytes:
                raise TooLarge(f"The images have more than {self._max_total_bytes} bytes in all.")
            return image

        tasks = [asyncio.create_task(one(image)) for image in images]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            return tuple(task.result() for task in tasks)
        finally:
            await end(tasks)

    # ---- inside

    async def _fetch(self, address: str) -> str:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._follow(address)
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise _lost(address, f"did not come within {TIMEOUT_S:g} s") from exc
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
            raise _lost(address, f"could not be fetched ({type(exc).__name__})") from exc

    async def _follow(self, address: str) -> str:
        for hop in range(_REDIRECTS + 1):
            host = self._host(address)
            ip = await self._resolved(address, host, redirected=hop > 0)
            request = self._request(address, host, ip)
            response = await self._client.send(request, stream=True)
            try:
                if response.is_redirect:
                    address = urljoin(address, response.headers["location"])
                    continue
                return await self._read(address, response)
            finally:
                await response.aclose()
        raise _lost(address, f"is behind more than {_REDIRECTS} redirects")

    def _request(self, address: str, host: str, ip: str) -> httpx.Request:
        """A request to ``ip`` that says, in its header and in TLS, that ``host`` is meant."""
        url = httpx.URL(address)
        return self._client.build_request(
            "GET",
            url.copy_with(host=ip, userinfo=b"", fragment=None),
            headers={
                "host": url.netloc.decode("ascii"),
                "accept": "image/*",
                "accept-encoding": "identity",  # what is small here must not be large there
            },
            extensions={"sni_hostname": host},
        )

    async def _read(self, address: str, response: httpx.Response) -> str:
        if response.status_code != 200:
            raise _lost(address, f"was answered with status {response.status_code}")
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not media_type.startswith("image/"):
            raise _lost(address, f"is {media_type or 'of no stated type'}, not an image")
        data = bytearray()
        async for piece in response.aiter_raw():
            data += piece
            if len(data) > self._max_bytes:
                raise TooLarge(
                    f"The image at {_shown(address)} has more than {self._max_bytes} bytes.",
                    remedy="Choose a smaller one, or raise the controller's --max-image-bytes.",
                )
        encoded = await asyncio.to_thread(base64.b64encode, data)
        return f"data:{media_type};base64,{encoded.decode()}"

    def _host(self, address: str) -> str:
        """The host of ``address``, which is on the list; raises as ``check`` does."""
        if not self._hosts:
            raise Unsupported(
                "Images are taken as data URIs only; this server fetches no addresses.",
                remedy=_REMEDY,
            )
        try:
            parts = urlsplit(address)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or parts.scheme not in ("http", "https"):
            raise BadImage("An image's address is not http://host/path or https://host/path.")
        if not any(_matches(host, pattern) for pattern in self._hosts):
            raise Forbidden(
                f"Images are not fetched from {host!r} here.",
                remedy=f"{_REMEDY} Or have the host added with --image-url-host.",
            )
        return host

    async def _resolved(self, address: str, host: str, *, redirected: bool) -> str:
        """The IP address to connect to.

        Raises:
            Forbidden: it is one inside, and nobody has named it.
            OSError: the name is unknown.
        """
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ips = [str(info[4][0]) for info in found]
        named = host in self._hosts and not redirected
        if not named and not all(is_public(ip) for ip in ips):
            raise Forbidden(
                f"{host!r} is an address inside; images are fetched from public ones.",
                remedy=_REMEDY,
            )
        return ips[0]


def is_public(ip: str) -> bool:
    """Whether ``ip`` is an address of the world outside, an embedded IPv4 address included."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    inner = None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or _nat64(address)
    if inner is not None:
        return is_public(str(inner))
    return address.is_global and not address.is_multicast


def _nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address behind 64:ff9b::/96 (RFC 6052)."""
    if address in ipaddress.IPv6Network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def _matches(host: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


def _shown(address: str) -> str:
    """``address`` for an error: without what may be a secret in its query, and not too long."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"[:200]


def _lost(address: str, what: str) -> TandemError:
    return BadImage(f"The image at {_shown(address)} {what}.", remedy=_REMEDY)
