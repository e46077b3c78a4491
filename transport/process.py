"""What every process of a cluster does around its work: parse settings, log, serve, stop.

Exit codes: 0 a clean stop, 2 a bad setting, 3 could not start, 70 the engine died.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

import uvicorn
from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    CliSuppress,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
)
from starlette.types import ASGIApp

from protocol import logs
from transport.credentials import TOKEN_VARIABLE, is_loopback
from transport.helptext import HelpFormatter
from transport.tls import Tls

_ACCEPTS_PER_TURN = 16

EXIT_USAGE = 2
EXIT_START_FAILED = 3
EXIT_ENGINE_DIED = 70

_TOKEN_CHARACTERS = 16
_MAKE_TOKEN = (
    f"export {TOKEN_VARIABLE}=$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')"
)

log = logging.getLogger("tandem")


T = TypeVar("T")


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


Several = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split)]
"""A flag that may be given several times, or once with commas, as the environment has it."""


class ProcessSettings(BaseSettings):
    """Settings of every process: flag over environment (``TANDEM_...``) over default."""

    model_config = SettingsConfigDict(
        env_prefix="TANDEM_",
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        nested_model_default_partial_update=False,
    )

    cluster_token: CliSuppress[SecretStr | None] = Field(
        default=None, description="what processes and operators of this cluster show each other"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least severe entry that is logged"
    )
    log_json: bool = Field(default=False, description="log one JSON object a line")
    otlp_endpoint: str | None = Field(
        default=None,
        description="OpenTelemetry collector to send traces to, such as http://127.0.0.1:4318",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        return None if value is None else check_collector(value)

    @field_validator("cluster_token")
    @classmethod
    def _hard_to_guess(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        token = value.get_secret_value()
        if len(token) < _TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()):
            raise ValueError(
                f"a token has at least {_TOKEN_CHARACTERS} characters, all printable ASCII; "
                f"make one: {_MAKE_TOKEN}"
            )
        return value

    @field_validator("host")
    @classmethod
    def _guarded(cls, value: str, info: ValidationInfo) -> str:
        # A token that is refused is missing from info, and has a sentence of its own.
        if not is_loopback(value) and info.data.get("cluster_token", "refused") is None:
            raise ValueError(
                f"other machines could reach {value or 'every address'} and command this process; "
                f"give the controller, the workers and yourself one token first: {_MAKE_TOKEN}"
            )
        return value

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the process."""
        return is_loopback(self.host)


S = TypeVar("S", bound=ProcessSettings)


def parse(cls: type[S], argv: Sequence[str] | None = None, **extra: Any) -> S:
    """The settings from ``argv`` (the command line when ``None``) and the environment.

    A bad flag or value ends the process with a sentence and exit code 2. Logging is configured
    as they say, and they are logged once, secrets masked.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    secrets = [name for name, field in cls.model_fields.items() if _HIDDEN in field.metadata]
    for flag in (_flag(name) for name in secrets):
        if any(arg == flag or arg.startswith(f"{flag}=") for arg in args):
            variable = flag[2:].replace("-", "_").upper()
            usage_error(
                f"{flag} is no flag, as everybody on this machine could read it; "
                f"export TANDEM_{variable} instead."
            )
    try:
        source: CliSettingsSource[S] = CliSettingsSource(cls, formatter_class=HelpFormatter)
        settings = CliApp.run(cls, cli_args=args, cli_settings_source=source, **extra)
    except ValidationError as exc:
        for error in exc.errors(include_url=False, include_input=False):
            name = str(error["loc"][0]) if error["loc"] else ""
            shown = f"TANDEM_{name.upper()}" if name in secrets else _flag(name)
            text = error["msg"].removeprefix("Value error, ")
            _complain(f"{shown if name else 'settings'}: {text}")
        raise SystemExit(EXIT_USAGE) from None
    except SettingsError as exc:
        usage_error(str(exc))
    logs.configure(level=settings.log_level, as_json=settings.log_json)
    # model_dump_json masks SecretStr fields; an address may hold a password, too.
    log.info("settings %s", re.sub(r"//[^/@\"]+@", "//***@", settings.model_dump_json()))
    return settings


_HIDDEN = argparse.SUPPRESS  # how CliSuppress marks a field


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def usage_error(sentence: str) -> NoReturn:
    """End the process over a mistake of its user: one sentence, exit code 2."""
    _complain(sentence)
    raise SystemExit(EXIT_USAGE)


def _complain(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")


def bind(host: str, port: int | None, *, first_free: int = 0) -> socket.socket:
    """A listening socket on ``port``; when it is ``None``, on the first free one from
    ``first_free`` up (0: any).

    A port that is taken ends the process with a sentence and exit code 2.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    candidates = [port] if port is not None else range(first_free, first_free + 1000)
    for candidate in candidates:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, candidate))
            sock.listen(4096)  # may be refused too: two can bind at the same moment
        except OSError as exc:
            sock.close()
            if exc.errno == errno.EADDRINUSE and port is None:
                continue
            reason = "is taken by another process" if exc.errno == errno.EADDRINUSE else str(exc)
            usage_error(f"{host}:{candidate} {reason}; choose another with --port.")
        sock.setblocking(False)
        return sock
    usage_error(f"No free port from {first_free} to {first_free + 999} on {host}.")


def free_port(host: str = "127.0.0.1") -> int:
    """A port of ``host`` that nobody listens on now, for a process that cannot be handed a socket.

    Raises:
        OSError: ``host`` is no address of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


def address_of(sock: socket.socket, *, scheme: str = "http") -> str:
    """``http://host:port`` at which ``sock`` is reached from this machine."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_address(address: str, *, https: bool = False, password: bool = False) -> str:
    """``address`` without its trailing slash; ``https`` and ``password`` say what it may have.

    Raises:
        ValueError: it is not ``http://host:port``.
    """
    parts = urlsplit(address.rstrip("/"))
    try:
        valid = bool(parts.hostname) and (
            (parts.scheme == "http" and parts.port is not None)
            or (https and parts.scheme == "https" and parts.port != 0)
        )
    except ValueError:  # a port that is no number, or above 65535
        valid = False
    if not valid:
        raise ValueError(f"{bare(address)!r} is not an address like http://127.0.0.1:21001")
    if not password and parts.netloc != bare(address).partition("://")[2].partition("/")[0]:
        raise ValueError(f"leave the password out of {bare(address)}, and set {TOKEN_VARIABLE}")
    return address.rstrip("/")


def bare(address: str) -> str:
    """``address`` as it may be shown: without a user and a password."""
    return re.sub(r"//[^/@]*@", "//", address)


def check_collector(endpoint: str) -> str:
    """``endpoint`` as it is.

    Raises:
        ValueError: it is not an address of HTTP, or holds a password, which would be logged.
    """
    parts = urlsplit(endpoint)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or above 65535
        valid = False
    if "@" in parts.netloc:
        raise ValueError("give a password in OTEL_EXPORTER_OTLP_HEADERS, not in the address")
    if not valid or parts.query or parts.fragment:
        raise ValueError(f"{endpoint!r} is not an address like http://127.0.0.1:4318")
    return endpoint


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: signals are the process's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """A uvicorn server on a bound socket, started and stopped by its owner."""

    def __init__(
        self, app: ASGIApp, sock: socket.socket, *, grace_s: float, tls: Tls | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            http="httptools",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(grace_s)),
            lifespan="off",
            backlog=4096,
            **(tls.options() if tls is not None else {}),
        )
        self._uvicorn = _Server(config)
        # uvloop accepts one connection a turn of the loop for each socket it watches. Under load
        # a turn is long and newcomers would wait for seconds, so it watches this one many times.
        self._socks = [sock, *(sock.dup() for _ in range(_ACCEPTS_PER_TURN - 1))]
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when requests are accepted; cancelled, it leaves nothing that listens."""
        self._task = asyncio.create_task(self._uvicorn.serve(sockets=self._socks))
        try:
            await self._started(self._task)
        except asyncio.CancelledError:
            await self._started(self._task)  # uvicorn gives back only what it has finished taking
            await self.kill()
            raise

    async def _started(self, task: asyncio.Task[None]) -> None:
        while not self._uvicorn.started:
            if task.done():
                task.result()
                raise RuntimeError("the server ended while it was starting")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop listening, let open requests end within the grace period, then cancel them."""
        if self._task is not None:
            self._uvicorn.should_exit = True
            await self._task

    async def kill(self) -> None:
        """Stop listening and cancel open requests at once; harmless after ``stop``."""
        self._uvicorn.force_exit = True
        for task in list(self._uvicorn.server_state.tasks):
            task.cancel()
        await self.stop()


def run(main: Callable[[StopSignal], Awaitable[int]]) -> NoReturn:
    """Run ``main`` on uvloop and exit with the code it returns."""
    import uvloop

    async def supervised() -> int:
        return await main(StopSignal())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(supervised())
        others = [
            t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()
        ]
        if others:
            # One that loads a model or downloads it would hold the process until it is done.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
    raise SystemExit(code)


async def first_of(*awaitables: Awaitable[object]) -> None:
    """Return when the first has ended, raising its exception if it has one; cancel the others."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class StopSignal:
    """SIGTERM and SIGINT as something to wait for; the second one means: at once."""

    def __init__(self) -> None:
        self._count = 0
        self._first = asyncio.Event()
        self._second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._count += 1
        (self._first if self._count == 1 else self._second).set()

    @property
    def given(self) -> bool:
        return self._first.is_set()

    async def wait(self) -> None:
        await self._first.wait()

    async def wait_impatient(self) -> None:
        await self._second.wait()
