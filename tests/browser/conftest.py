"""A real cluster on the embedded model, the page before it, and a browser that opens it.

Everything is started once for this folder; each test has a context (cookies, storage) of its own.
Pictures of what tests saw are in ``run/browser``.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.processes import ROOT, Process, running, until, wait_workers

START_TIMEOUT_S = 240
HERE = Path(__file__).parent
PICTURES = ROOT / "run" / "browser"
MODEL = ROOT / "models" / "pocket-llava"
ADAPTERS = ROOT / "models" / "adapters"
MAX_IMAGE_BYTES = 200_000
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DESK: dict[str, Any] = {"viewport": {"width": 1440, "height": 900}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
HF_SLOTS = 2


def worker_flags(kind: str, controller: str) -> tuple[str, ...]:
    flags: tuple[str, ...] = (
        *("--port", "0", "--model-path", str(MODEL), "--device", "cpu", "--dtype", "float32"),
        *("--worker-id", f"{kind}-1", "--controller-address", controller),
    )
    if kind == "hf":
        flags += ("--limit-model-concurrency", str(HF_SLOTS))
        flags += ("--adapter", f"terse={ADAPTERS / 'terse'}")
    return flags


@dataclass
class Cluster:
    """The processes; a killed worker is started again by ``whole``."""

    folder: Path
    stack: ExitStack
    controller: str
    workers: dict[str, Process] = field(default_factory=dict)

    def start(self, kind: str) -> None:
        flags = worker_flags(kind, self.controller)
        self.workers[kind] = self.stack.enter_context(
            running(self.folder, f"workers.{kind}", *flags)
        )

    def wait_ready(self) -> None:
        wait_workers(self.controller, len(self.workers), START_TIMEOUT_S)

    @contextmanager
    def slowed(self, kind: str) -> Iterator[threading.Event]:
        """The worker computes a small part of the time, and not at all once the event is set."""
        process, done, frozen = self.workers[kind], threading.Event(), threading.Event()

        def pulse() -> None:
            while not done.wait(0.008):
                process.signal(signal.SIGSTOP)
                done.wait(0.06)
                if not frozen.is_set():
                    process.signal(signal.SIGCONT)

        thread = threading.Thread(target=pulse)
        thread.start()
        try:
            yield frozen
        finally:
            done.set()
            thread.join()
            process.signal(signal.SIGCONT)

    @contextmanager
    def frozen(self, kind: str) -> Iterator[None]:
        """The worker does nothing, and says nothing about it."""
        self.workers[kind].signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.workers[kind].signal(signal.SIGCONT)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These come last: Playwright keeps an event loop running in this thread until the session
    ends, and no async test can run beside it."""
    items.sort(key=lambda item: item.path.parent == HERE)


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        controller = stack.enter_context(running(folder, "controller", "--port", "0"))
        cluster = Cluster(folder, stack, controller.wait_ready())
        for kind in ("hf", "sglang"):
            cluster.start(kind)
        yield cluster


def start_page(stack: ExitStack, folder: Path, controller: str, *flags: str) -> Process:
    """A chat page; it is ready when ``wait_ready`` says so."""
    data = ("--data-dir", str(folder / "data"), "--max-image-bytes", str(MAX_IMAGE_BYTES))
    address = ("--port", "0", "--controller-address", controller)
    return stack.enter_context(running(folder, "ui", *address, *data, *flags))


@pytest.fixture(scope="package")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page, when it and both workers are ready."""
    with ExitStack() as stack:
        process = start_page(stack, tmp_path_factory.mktemp("page"), cluster.controller)
        address = process.wait_ready(60)
        cluster.wait_ready()
        yield address


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    found = next((path for name in CHROMIUM if (path := which(name))), None)
    if found is None:
        pytest.fail("these tests need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test finds both workers, whatever the one before did to them."""
    if "cluster" in request.fixturenames or "site" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("cluster")
        cluster.wait_ready()
        yield
        for kind, process in list(cluster.workers.items()):
            if not process.alive:
                cluster.start(kind)
    else:
        yield


expect.set_options(timeout=15_000)  # two cores may be busy with other things

Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, site: str) -> Iterator[Open]:
    """Opens pages; a fault in their scripts, or a request to anyone else, fails the test."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def open_(path: str = "/", *, base: str = site, **options: Any) -> Page:
        context = browser.new_context(
            **DESK | {"permissions": ["clipboard-read", "clipboard-write"]} | options
        )
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))

        def requested(url: str) -> None:
            if not url.startswith((base, "data:", "blob:")):
                faults.append(f"request: {url}")

        page.on("request", lambda request: requested(request.url))
        page.goto(base + path, wait_until="domcontentloaded")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(open_page: Open) -> Page:
    """An empty chat."""
    page = open_page()
    expect(page.locator("#tx .hero .ex")).to_have_count(4)
    return page


# ---------------------------------------------------------------- what people do

BOT = "#tx [data-testid=bot-turn]"
USER = "#tx [data-testid=user-turn]"


def box(page: Page) -> Locator:
    return page.locator("#box textarea")


def stop(page: Page) -> Locator:
    return page.locator("#box").get_by_role("button", name="Stop")


def send(page: Page, text: str) -> None:
    expect(box(page)).to_be_editable()
    box(page).fill(text)
    box(page).press("Enter")


def answered(page: Page, number: int = 1, timeout_s: float = 20) -> Locator:
    """The last of ``number`` answers, once it is complete."""
    expect(page.locator(BOT)).to_have_count(number, timeout=timeout_s * 1000)
    expect(page.locator("#live [data-testid=live]")).to_have_count(0)
    expect(page.locator("#box [data-testid=submit-button]")).to_be_visible()
    return page.locator(BOT).last


def attach(page: Page, *files: Path) -> None:
    page.locator("#box input[type=file]").set_input_files(files)
    expect(page.locator("#box .thumbnail-wrapper img")).to_have_count(len(files))


def choose_kind(page: Page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).check(force=True)


def look(page: Page, name: str, *, whole: bool = False) -> None:
    """Keep a picture of the page as it is."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=whole)


def idle(cluster: Cluster) -> None:
    """Until no request is running anywhere."""

    def none_running() -> bool:
        load = httpx.get(f"{cluster.controller}/cluster").json()["load"]
        return bool(load["inflight"] == load["waiting"] == 0)

    until(none_running, what="an idle cluster")
