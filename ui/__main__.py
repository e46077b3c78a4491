"""Start the chat page: ``python -m ui --controller-address http://127.0.0.1:21001``.

``python -m ui export`` writes all feedback and votes as JSON lines, to ``--out`` or standard
output.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import socket
import sqlite3
import sys
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from transport import process
from transport.addresses import address_of
from transport.exits import usage_error
from transport.settings import parse
from ui.settings import UiSettings, default_data_dir

if TYPE_CHECKING:
    from ui.model import Answer
    from ui.store import Database

GRACE_S = 3.0
DATABASE = "chat.db"

log = logging.getLogger("ui")


def main() -> None:
    if sys.argv[1:2] == ["export"]:
        _export(sys.argv[2:])
        return
    settings = parse(UiSettings)
    # Before Gradio is imported: nothing is sent to anyone, and uploads stay in our folder.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    uploads = settings.data_dir / "uploads"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.absolute())
    # Where it is installed, Gradio would import it during the first event and turn it off and on
    # around every other: seconds, and then milliseconds, for pictures that are not drawn here.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    database = _open(settings.data_dir)
    with closing(database):
        sock = process.bind(settings.host, settings.port)
        try:
            import gradio  # noqa: F401  (seconds of work, so not within the loop)
        except ImportError:
            usage_error("The page needs Gradio: pip install 'tandem[ui]'.")
        gc.collect()
        gc.freeze()
        process.run(lambda stop: serve(settings, database, sock, uploads, stop))


def _export(argv: list[str]) -> None:
    from ui import export

    parser = argparse.ArgumentParser(prog="python -m ui export", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of the database")
    parser.add_argument("--out", type=Path, default=None, help="file to write; standard output")
    args = parser.parse_args(argv)
    folder = args.data_dir or Path(os.environ.get("TANDEM_DATA_DIR") or default_data_dir())
    if not (folder / DATABASE).exists():
        usage_error(f"There is no {DATABASE} in {folder}; name its folder with --data-dir.")
    with closing(_open(folder)) as database:
        if args.out is None:
            export.feedback(database, sys.stdout)
        else:
            with args.out.open("w", encoding="utf-8") as out:
                number = export.feedback(database, out)
            print(f"{number} lines in {args.out}")


def _open(folder: Path) -> Database:
    from ui.store import Database

    try:
        return Database(folder / DATABASE)
    except (OSError, sqlite3.Error) as exc:
        usage_error(f"--data-dir {folder} cannot be used: {exc}.")


async def serve(
    settings: UiSettings,
    database: Database,
    sock: socket.socket,
    uploads: Path,
    stop: process.StopSignal,
) -> int:
    """Serve until a signal; answers that are being written are saved as far as they are."""
    from ui.app import create_app
    from ui.client import Controller
    from ui.jobs import Jobs
    from ui.parts import Parts
    from ui.store import Store
    from ui.watch import Watch

    address = address_of(sock)
    controller = Controller(settings.controller_address, token=settings.token)
    store = Store(database)

    async def save(answer: Answer) -> None:
        await store(database.save, answer)

    watch, jobs = Watch(controller), Jobs(controller, save)
    await watch.look()
    front, inner = create_app(Parts(settings, controller, watch, store, jobs, uploads))
    server = process.Server(front, sock, grace_s=GRACE_S)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(controller.aclose)
        await stack.enter_async_context(inner.router.lifespan_context(inner))
        await server.start()
        stack.push_async_callback(server.kill)
        watching = asyncio.create_task(watch.run())
        stack.callback(watching.cancel)
        log.info("listening", extra={"address": address + settings.root_path})
        if settings.share:
            log.info("shared", extra={"address": await asyncio.to_thread(_tunnel, sock)})
        await stop.wait()
        await jobs.aclose()
        await process.first_of(server.stop(), stop.wait_impatient())
    return 0


def _tunnel(sock: socket.socket) -> str:
    """A public address of Gradio's that leads here; asks Gradio's servers for it."""
    import secrets

    from gradio.networking import setup_tunnel

    host, port = sock.getsockname()[:2]
    return str(setup_tunnel(host, port, secrets.token_urlsafe(32), None, None))


if __name__ == "__main__":
    main()
