"""What the page says when things are not as they should be, and that it gets over them."""

from __future__ import annotations

import os
import re
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.conftest import (
    HF_SLOTS,
    MAX_IMAGE_BYTES,
    START_TIMEOUT_S,
    Cluster,
    Open,
    answered,
    attach,
    box,
    choose_kind,
    look,
    send,
    start_page,
    stop,
)
from tests.processes import Process, running, until, wait_workers
from tests.streams import user

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)

COUNT = "Count from 1 to 100."


def card(page: Page, name: str) -> Any:
    return page.locator(f"[data-state={name}]")


def test_a_killed_worker_is_told_and_the_answer_goes_on_elsewhere(
    page: Page, cluster: Cluster
) -> None:
    choose_kind(page, "HF")
    with cluster.slowed("hf"):
        send(page, COUNT)
        expect(page.locator("#live .md")).to_contain_text("1 2 3 4 5", timeout=20_000)
        cluster.workers["hf"].kill()
    state = card(page, "upstream_lost")
    expect(state).to_contain_text("was lost in mid-answer", timeout=20_000)
    expect(state).to_contain_text("sglang-1 can go on at the exact token")
    expect(page.locator("[data-testid=bot-turn] .md")).to_contain_text("1 2 3 4 5")
    look(page, "state-lost")
    before = page.locator("[data-testid=bot-turn] .md").inner_text()
    state.get_by_role("button", name="Continue").click()
    whole = answered(page).locator(".md")
    expect(state).to_have_count(0)
    assert whole.inner_text().startswith(before)
    expect(whole).to_have_text(re.compile("^" + " ".join(map(str, range(1, 60)))))
    expect(page.locator("[data-testid=bot-turn] .bk-sglang")).to_be_visible()


def test_a_queued_question_knows_its_place(page: Page, cluster: Cluster) -> None:
    asked = {"model": "pocket-llava", "messages": user(COUNT), "kind": "hf"}
    choose_kind(page, "HF")
    with ExitStack() as stack, cluster.frozen("hf"):
        client = stack.enter_context(httpx.Client(base_url=cluster.controller, timeout=60))

        def ask() -> None:
            client.post("/worker_generate_stream", json=asked)

        others = [threading.Thread(target=ask) for _ in range(HF_SLOTS + 1)]
        for other in others:
            other.start()
            stack.callback(other.join, 30)

        def full() -> bool:
            load = httpx.get(f"{cluster.controller}/cluster").json()["load"]
            return bool(load["inflight"] == HF_SLOTS and load["waiting"] == 1)

        until(full, what="a full worker")
        send(page, "What is Tandem for?")
        expect(card(page, "queued")).to_contain_text("1 request before you")
        look(page, "state-queued")
        stop(page).click()
        expect(answered(page)).to_contain_text("Stopped by you")


def test_an_image_that_is_too_large_is_shrunk(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.effect_noise((480, 480), 90).convert("RGB").save(path)
    assert path.stat().st_size > MAX_IMAGE_BYTES
    attach(page, path)
    send(page, "What is this?")
    state = card(page, "too-large")
    expect(state).to_contain_text(re.compile(r"“large.png” is 0\.\d MB; the limit is 0\.2 MB"))
    expect(box(page)).to_have_value("What is this?")
    look(page, "state-too-large")
    state.get_by_role("button", name="Shrink and send").click()
    answered(page)
    expect(state).to_have_count(0)
    expect(page.locator("#tx [data-testid=user-turn] img")).to_have_count(1)


def test_a_file_that_is_no_image_is_refused(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "not.png"
    path.write_bytes(b"<svg onload=alert(1)>")
    page.locator("#box input[type=file]").set_input_files(path)
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(1)
    send(page, "What is this?")
    expect(card(page, "not-sent")).to_contain_text("is not an image the workers read")
    page.get_by_role("button", name="All right").click()
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(0)
    expect(box(page)).to_have_value("What is this?")


def test_a_conversation_that_is_too_long_says_so(page: Page) -> None:
    send(page, "word " * 6000)
    state = card(page, "context_overflow")
    expect(state).to_contain_text("too long for the model", timeout=20_000)
    expect(state).to_contain_text(re.compile(r"\d{4} tokens"))
    look(page, "state-context")
    state.get_by_role("button", name="New chat").click()
    expect(page.locator("#tx .hero")).to_be_visible()


# ---------------------------------------------------------------- a page of its own


USER, SECRET = "ada", "s3cret:with:colons"
PASSWORD = {"username": USER, "password": SECRET}


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A controller without workers and a page that asks for a password, below a path."""
    folder = tmp_path_factory.mktemp("lonely")
    with ExitStack() as stack:
        controller = stack.enter_context(
            running(folder, "controller", "--port", "0", "--max-waiting", "0")
        )
        address = controller.wait_ready()
        page = start_page(stack, folder, address, "--auth", f"{USER}:{SECRET}")
        yield folder, controller, address, page.wait_ready(60)


def test_without_a_model_the_page_waits_and_opens_by_itself(open_page: Open, lonely: Any) -> None:
    folder, _, address, base = lonely
    assert httpx.get(base).status_code == 401
    assert httpx.get(base, auth=("ada", "wrong")).status_code == 401
    assert httpx.get(f"{base}/config", auth=(USER, SECRET)).status_code == 200
    page = open_page("/", base=base, http_credentials=PASSWORD)
    expect(page.get_by_test_id("no-models")).to_contain_text("No model is being served yet")
    expect(page.get_by_test_id("no-models")).to_contain_text("python -m workers.hf")
    look(page, "state-no-models")
    send(page, "Hello?")
    expect(card(page, "not-sent")).to_contain_text("There is no model to ask yet")
    expect(box(page)).to_have_value("Hello?")
    flags = ("--port", "0", "--delay-s", "0.05", "--limit-model-concurrency", "1")
    with running(folder, "workers.echo", *flags, "--controller-address", address):
        wait_workers(address, 1)
        expect(page.locator("#tx .ex").first).to_be_visible()
        send(page, "hello " * 600)
        expect(page.locator("#live .md")).to_contain_text("hello")
        # The one slot is taken and nobody may wait: the next question is refused, with a time.
        second = open_page("/", base=base, http_credentials=PASSWORD)
        expect(second.locator("#tx .ex").first).to_be_visible()
        send(second, "and me?")
        state = card(second, "overloaded")
        expect(state).to_contain_text("The queue is full")
        look(second, "state-full")
        stop(page).click()
        expect(answered(page)).to_contain_text("Stopped by you")
        state.get_by_role("button", name="Try again").click(timeout=30_000)
        expect(answered(second)).to_contain_text("and me?")


def test_a_lost_controller_is_told_and_found_again(open_page: Open, lonely: Any) -> None:
    folder, controller, address, base = lonely
    page = open_page("/", base=base, http_credentials=PASSWORD)
    expect(page.get_by_test_id("health")).to_contain_text("waiting for workers")
    controller.kill()
    expect(card(page, "controller-away")).to_contain_text("reconnects by itself", timeout=15_000)
    expect(page.get_by_test_id("health")).to_contain_text("controller away")
    look(page, "state-away")
    port = address.rpartition(":")[2]
    with running(folder, "controller", "--port", port) as again:
        again.wait_ready()
        expect(card(page, "controller-away")).to_have_count(0, timeout=15_000)
        expect(page.get_by_test_id("health")).to_contain_text("waiting for workers")


def test_a_page_that_was_killed_offers_to_go_on(
    open_page: Open, cluster: Cluster, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first: Process = start_page(stack, tmp_path, cluster.controller)
        base = first.wait_ready(60)
        page = open_page("/", base=base)
        expect(page.locator("#tx .ex").first).to_be_visible()
        choose_kind(page, "HF")
        with cluster.slowed("hf") as freeze:
            send(page, COUNT)
            expect(page.locator("#live .md")).to_contain_text(" 5 ", timeout=30_000)
            freeze.set()
            page.wait_for_timeout(2500)  # what there is was saved
            os.kill(first.pid, 9)
        port = base.rpartition(":")[2]
        second = start_page(stack, tmp_path, cluster.controller, "--port", port)
        second.wait_ready(60)
        state = card(page, "interrupted")  # the page connects and loads again by itself
        expect(state).to_contain_text("The chat page was restarted", timeout=40_000)
        state.get_by_role("button", name="Continue").click()
        expect(answered(page).locator(".md")).to_have_text(
            re.compile("^" + " ".join(map(str, range(1, 60))))
        )
