"""The chat, as people use it: asked, streamed, stopped, asked again, kept."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Dialog, Page, expect

from tests.browser.conftest import (
    BOT,
    START_TIMEOUT_S,
    USER,
    Cluster,
    Open,
    answered,
    attach,
    box,
    choose_kind,
    idle,
    look,
    send,
    stop,
)
from tests.pictures import encoded, picture

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)

COUNT = "Count from 1 to 100."
COUNTED = re.compile("^" + " ".join(map(str, range(1, 60))))  # it may lose count later
RED = re.compile("red circle")


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    picture("circle", "red").save(path)
    return path


def test_a_question_about_a_picture_is_streamed_and_right(
    page: Page, cluster: Cluster, red: Path
) -> None:
    look(page, "chat-empty")
    choose_kind(page, "HF")
    attach(page, red)
    box(page).fill("What is this?")
    look(page, "chat-attached")
    with cluster.slowed("hf"):
        box(page).press("Enter")
        live = page.locator("#live .md")
        expect(live).to_have_text(re.compile("This is"), timeout=20_000)
        expect(page.locator("#live")).to_contain_text("HF")
    answer = answered(page)
    expect(answer).to_contain_text(RED)
    expect(answer.locator("[data-testid=stats]")).to_contain_text(
        re.compile(r"HF.*\d s.*tok/s.*token")
    )
    expect(page.locator(f"{USER} img")).to_be_visible()
    assert page.locator(f"{USER} img").evaluate("image => image.naturalWidth") == 112
    look(page, "chat-answered")


def test_stop_keeps_what_came_and_the_worker_stops(page: Page, cluster: Cluster) -> None:
    choose_kind(page, "HF")
    with cluster.slowed("hf"):
        send(page, COUNT)
        expect(page.locator("#live .md")).to_contain_text("1 2 3 4 5", timeout=20_000)
        look(page, "chat-streaming")
        stop(page).click()
        answer = answered(page)
        idle(cluster)
    expect(answer).to_contain_text("Stopped by you")
    expect(answer).to_contain_text("1 2 3 4 5")
    answer.get_by_role("button", name="Continue").click()
    expect(answered(page).locator(".md")).to_have_text(COUNTED)
    expect(page.locator(BOT)).not_to_contain_text("Stopped")


def test_escape_stops(page: Page, cluster: Cluster) -> None:
    choose_kind(page, "HF")
    with cluster.slowed("hf"):
        send(page, COUNT)
        expect(page.locator("#live .md")).to_contain_text("1 2 3", timeout=20_000)
        page.keyboard.press("Escape")
        expect(answered(page)).to_contain_text("Stopped by you")


def test_retry_makes_a_second_answer_beside_the_first(page: Page) -> None:
    send(page, "What is Tandem for?")
    answered(page).get_by_role("button", name="Answer again").click()
    expect(page.locator(BOT)).to_contain_text("2/2", timeout=20_000)
    answered(page)
    page.get_by_role("button", name="Previous answer").click()
    expect(page.locator(BOT)).to_contain_text("1/2")
    page.reload()
    expect(page.locator(BOT)).to_contain_text("1/2")


def test_editing_a_question_keeps_its_picture(page: Page, red: Path) -> None:
    attach(page, red)
    send(page, "What is this?")
    answered(page)
    page.locator(USER).hover()
    page.get_by_role("button", name="Edit message").click()
    look(page, "chat-edit")
    editor = page.get_by_test_id("edit-box")
    expect(editor).to_have_value("What is this?")
    editor.fill("What color is it?")
    editor.press("Enter")
    expect(page.locator(USER)).to_contain_text("What color is it?")
    expect(answered(page).locator(".md")).to_have_text("It is red.")
    expect(page.locator(f"{USER} img")).to_have_count(1)


def test_an_image_is_pasted(page: Page) -> None:
    box(page).click()
    page.evaluate(
        """data => {
          const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
          const clipboard = new DataTransfer();
          clipboard.items.add(new File([bytes], 'pasted.png', {type: 'image/png'}));
          document.querySelector('#box textarea').dispatchEvent(new ClipboardEvent(
            'paste', {clipboardData: clipboard, bubbles: true, cancelable: true}));
        }""",
        encoded(picture("square", "blue")),
    )
    expect(page.locator("#box .thumbnail-wrapper img")).to_have_count(1)
    send(page, "What is this?")
    expect(answered(page)).to_contain_text("blue square")


def test_an_image_is_dragged_in(page: Page) -> None:
    page.evaluate(
        """data => {
          const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
          const dragged = new DataTransfer();
          dragged.items.add(new File([bytes], 'dragged.png', {type: 'image/png'}));
          for (const type of ['dragenter', 'dragover', 'drop'])
            document.querySelector('#box textarea').dispatchEvent(new DragEvent(
              type, {dataTransfer: dragged, bubbles: true, cancelable: true}));
        }""",
        encoded(picture("circle", "green")),
    )
    expect(page.locator("#box .thumbnail-wrapper img")).to_have_count(1)
    send(page, "What color is it?")
    expect(answered(page)).to_contain_text("green")


def test_the_backend_and_the_adapter_are_chosen(page: Page) -> None:
    choose_kind(page, "SGLang")
    send(page, "What is Tandem for?")
    expect(answered(page).locator(".bk-sglang")).to_be_visible()
    choose_kind(page, "HF")
    page.locator("#open-settings").click()
    page.get_by_role("combobox", name="Adapter").click()
    page.get_by_role("option", name="terse").click()
    look(page, "chat-settings")
    page.get_by_role("button", name="Close settings").click()
    send(page, "What is Tandem for?")
    second = answered(page, 2)
    expect(second.locator(".bk-hf")).to_be_visible()
    expect(second.locator("[data-testid=stats]")).to_contain_text("terse")
    page.reload()  # the controls come back with the conversation
    expect(page.get_by_role("radio", name="HF", exact=True)).to_be_checked()


def test_a_question_is_taken_back_into_the_box(page: Page, red: Path) -> None:
    attach(page, red)
    send(page, "What is this?")
    answered(page).get_by_role("button", name="Take the last question back").click()
    expect(page.locator(USER)).to_have_count(0)
    expect(box(page)).to_have_value("What is this?")
    expect(page.locator("#box .thumbnail-wrapper img")).to_have_count(1)
    box(page).press("Enter")
    expect(answered(page)).to_contain_text(RED)


def test_feedback_with_a_comment_and_a_copy(page: Page) -> None:
    send(page, "What is Tandem for?")
    answer = answered(page)
    answer.get_by_role("button", name="Bad answer").click()
    comment = page.get_by_test_id("edit-box")
    comment.fill("Too long <b>")
    comment.press("Enter")
    expect(page.locator(BOT)).to_contain_text("Your comment: Too long <b>")
    expect(page.get_by_role("button", name="Bad answer")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Copy answer").click()
    expect(page.get_by_role("button", name="Copy answer").locator("rect")).to_have_count(0)
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("Tandem serves")
    assert "tok/s" not in copied


def test_a_reload_in_mid_answer_finds_it(page: Page, cluster: Cluster) -> None:
    choose_kind(page, "HF")
    with cluster.slowed("hf") as freeze:
        send(page, COUNT)
        expect(page.locator("#live .md")).to_contain_text("1 2 3", timeout=20_000)
        freeze.set()
        page.reload(wait_until="domcontentloaded")
        expect(page.locator("#live .md")).to_contain_text("1 2 3")
        expect(stop(page)).to_be_visible()
    expect(answered(page).locator(".md")).to_have_text(COUNTED)


def test_another_chat_meanwhile_loses_nothing(page: Page, cluster: Cluster) -> None:
    choose_kind(page, "HF")
    with cluster.slowed("hf"):
        send(page, COUNT)
        expect(page.locator("#live .md")).to_contain_text("1 2 3", timeout=20_000)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#tx .hero")).to_be_visible()
        expect(page.locator("#live [data-testid=live]")).to_have_count(0)
        choose_kind(page, "SGLang")
        send(page, "What is Tandem for?")
        expect(answered(page)).to_contain_text("Tandem serves")
    page.locator("#convs .op", has_text="Count from").click()
    expect(page.locator(USER)).to_contain_text(COUNT)
    expect(answered(page).locator(".md")).to_have_text(COUNTED)


def test_chats_are_listed_searched_renamed_exported_and_deleted(
    page: Page, site: str, red: Path, tmp_path: Path
) -> None:
    attach(page, red)
    send(page, "What is this?")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    send(page, "What is Tandem for?")
    answered(page)
    listed = page.locator("#convs .op")
    expect(listed).to_have_count(2)
    page.get_by_placeholder("Search chats").fill("red circle")
    expect(listed).to_have_text(["What is this?"])
    listed.click()
    page.get_by_placeholder("Search chats").fill("")
    expect(listed).to_have_count(2)
    page.locator("#convs .cv[aria-current]").get_by_role("button", name="Rename").click()
    name = page.get_by_test_id("edit-box")
    name.fill("My <i>circle</i>")
    name.press("Enter")
    expect(page.locator("#convs .cv[aria-current] .op")).to_have_text("My <i>circle</i>")

    def download(kind: str) -> Path:
        page.locator("#export summary").click()
        with page.expect_download() as started:
            page.get_by_role("link", name=kind).click()
        path = tmp_path / started.value.suggested_filename
        started.value.save_as(path)
        return path

    exported = json.loads(download("JSON").read_text())
    assert exported["messages"][1]["content"] == "This is a red circle."
    kept = exported["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert base64.b64decode(kept) == red.read_bytes()
    assert download("Markdown").suffix == ".zip"
    page.once("dialog", lambda dialog: dialog.accept())
    page.locator("#convs .cv[aria-current]").get_by_role("button", name="Delete").click()
    expect(listed).to_have_text(["What is Tandem for?"])
    expect(page.locator("#tx .hero")).to_be_visible()


def test_nobody_reads_the_chats_of_another_browser(page: Page, open_page: Open) -> None:
    send(page, "What is Tandem for?")
    answered(page)
    stranger = open_page("/" + page.url.rpartition("/")[2])
    expect(stranger.locator("#tx .hero")).to_be_visible()
    expect(stranger.locator("#convs .op")).to_have_count(0)
    chat = page.url.partition("c=")[2]
    assert page.request.get(page.url.partition("?")[0] + f"tandem/export/{chat}.md").status == 200
    other = stranger.request.get(page.url.partition("?")[0] + f"tandem/export/{chat}.md")
    assert other.status == 404


EVIL = (
    "<img src=x onerror=alert(1)> ${alert(2)} {{constructor.constructor('alert(3)')()}} "
    "`${alert(4)}` [x](javascript:alert(5)) <script>alert(6)</script> <image> "
    "$\\href{javascript:alert(7)}{x}$ </textarea><svg onload=alert(8)>"
)


def test_what_people_write_is_text(page: Page) -> None:
    opened: list[str] = []

    def note(dialog: Dialog) -> None:
        opened.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", note)
    send(page, EVIL)
    answered(page)
    page.reload()
    answered(page)
    expect(page.locator(f"{USER} .ub")).to_have_text(EVIL)
    assert page.locator(f"{USER} img, {USER} script, #convs img, #convs script").count() == 0
    assert not opened


def test_keys_alone_are_enough(page: Page) -> None:
    page.locator("body").click(position={"x": 700, "y": 600})
    page.keyboard.press("/")
    page.keyboard.type("What is Tandem for?")
    page.keyboard.press("Enter")
    answered(page)
    expect(box(page)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_test_id("edit-box")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("edit-box")).to_have_count(0)
    page.keyboard.press("Control+Shift+o")
    expect(page.locator("#tx .hero")).to_be_visible()
