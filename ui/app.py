"""The page as an ASGI application: Gradio's blocks, and the plain files beside them."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.responses import PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ui import door, export
from ui.api import publish
from ui.pages.chat import ChatPage
from ui.pages.cluster import ClusterPage
from ui.pages.compare import ComparePage
from ui.parts import HERE, Parts
from ui.theme import theme

FOREVER = "private, max-age=31536000, immutable"
UPLOAD_FACTOR = 4
"""Files up to so many times the largest image are taken, so that the page can shrink them."""

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" '
    'rx="10" fill="#0f766e"/><circle cx="16" cy="16" r="6" fill="#fbfaf8"/></svg>'
)


def create_app(parts: Parts) -> tuple[ASGIApp, FastAPI]:
    """The application behind its door, and the one inside, whose lifespan its owner enters."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _files(app, parts)
    _downloads(app, parts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SSR mode is not supported")  # nor asked for
        gr.mount_gradio_app(
            app,
            _blocks(parts),
            path="/",
            auth_dependency=_user if parts.settings.users else None,
            root_path=parts.root or None,
            theme=theme(),
            head=_head(parts.root),
            footer_links=[],
            run_history=False,  # it would keep every question in the browser's storage
            max_file_size=parts.settings.max_image_bytes * UPLOAD_FACTOR,
            show_error=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
        )
    return door.Door(app, parts.settings.users, parts.root), app


def _blocks(parts: Parts) -> gr.Blocks:
    with gr.Blocks(
        title=parts.settings.title,
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(3600, 24 * 3600),
    ) as blocks:
        gr.Navbar(visible=False)
    ChatPage(parts, blocks)
    ComparePage(parts, blocks)
    ClusterPage(parts, blocks)
    publish(parts, blocks)
    return blocks.queue(default_concurrency_limit=None, max_size=None)


def _user(request: Request) -> str | None:
    user: str | None = request.scope.get("state", {}).get("user")
    return user


def _head(root: str) -> str:
    """What Gradio adds to its page: our style, formulas and script, by content."""

    def versioned(name: str) -> str:
        digest = hashlib.sha256((HERE / name).read_bytes()).hexdigest()[:12]
        return f"{root}/tandem/{name}?v={digest}"

    return (
        '<meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover, '
        'interactive-widget=resizes-content">'
        f'<link rel="stylesheet" href="{versioned("ui.css")}">'
        f'<link rel="stylesheet" href="{root}/tandem/vendor/katex/katex.min.css">'
        f'<script src="{root}/tandem/vendor/katex/katex.min.js" defer></script>'
        f'<script src="{versioned("ui.js")}" data-root="{root}" defer></script>'
    )


def _files(app: FastAPI, parts: Parts) -> None:
    app.mount("/tandem/vendor", StaticFiles(directory=HERE / "vendor"))
    app.mount("/tandem/examples", StaticFiles(directory=HERE / "examples"))

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        view = parts.watch.view
        models = view.bases if view else []
        return {"state": "ready", "controller": parts.watch.there, "models": models}

    @app.get("/tandem/{name}")
    async def asset(name: str) -> Response:
        if name not in ("ui.css", "ui.js"):
            return PlainTextResponse("There is no such file.\n", 404)
        return FileResponse(HERE / name, headers={"cache-control": FOREVER})

    @app.get("/favicon.ico")
    async def favicon() -> Response:
        return Response(ICON, media_type="image/svg+xml", headers={"cache-control": FOREVER})

    @app.get("/manifest.json")
    async def manifest() -> JSONResponse:
        title = parts.settings.title
        return JSONResponse(
            {
                "name": title,
                "short_name": title,
                "display": "standalone",
                "start_url": f"{parts.root}/",
                "icons": [],
            }
        )

    @app.get("/tandem/media/{sha256}")
    async def media(sha256: str) -> Response:
        """An image by the hash of its content; nobody can guess one they have not seen."""
        found = await parts.store(parts.store.db.image, sha256)
        if found is None:
            return PlainTextResponse("There is no such image.\n", 404)
        media_type, data = found
        return Response(data, media_type=media_type, headers={"cache-control": FOREVER})


def _downloads(app: FastAPI, parts: Parts) -> None:
    @app.get("/tandem/export/{name}")
    async def exported(name: str, request: Request) -> Response:
        """A conversation as ``ID.md`` (a zip where there are images) or ``ID.json``."""
        conversation, _, form = name.rpartition(".")
        file = await export.conversation(parts.store, door.owner(request.scope), conversation, form)
        if file is None:
            return PlainTextResponse("You have no such chat.\n", 404)
        return Response(
            file.data,
            media_type=file.media_type,
            headers={
                "content-disposition": f'attachment; filename="{file.name}"',
                "cache-control": "no-store",
            },
        )
