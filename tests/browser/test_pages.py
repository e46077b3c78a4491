"""Compare and cluster, the programs' side door, and how it all looks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import (
    BOT,
    PHONE,
    START_TIMEOUT_S,
    Cluster,
    Open,
    answered,
    attach,
    box,
    look,
    send,
)
from tests.pictures import picture
from tests.processes import ROOT, workers_of
from tests.streams import user

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + 60)

AXE = (Path(__file__).parent / "axe.min.js").read_text()


def chosen(page: Page, name: str) -> Any:
    return page.get_by_role("combobox", name=f"Target {name}")


def test_two_targets_answer_and_are_voted_on(open_page: Open, tmp_path: Path) -> None:
    path = tmp_path / "star.png"
    picture("star", "yellow").save(path)
    page = open_page("/compare")
    expect(chosen(page, "A")).to_have_value(re.compile("pocket-llava"))
    attach(page, path)
    send(page, "What is this?")
    for name in "ab":
        pane = page.get_by_test_id(f"pane-{name}")
        expect(pane.locator(".md")).to_contain_text("yellow star", timeout=20_000)
        expect(pane.locator(".kp")).to_contain_text(re.compile(r"First token\d\.\d\d"))
    heads = page.locator(".pane header .bk").all_inner_texts()
    assert sorted(heads) == ["HF", "SGLang"]
    expect(page.locator(".race .g")).to_have_count(2)
    look(page, "compare")
    page.get_by_role("button", name="A is better").click()
    expect(page.locator(".thanks")).to_contain_text("Your vote is kept: A is better")
    expect(page.get_by_role("button", name="Tie")).to_be_hidden()


def test_blind_hides_the_names_until_the_vote(open_page: Open) -> None:
    page = open_page("/compare")
    expect(chosen(page, "B")).to_have_value(re.compile("pocket-llava"))
    page.get_by_role("checkbox", name="Blind").check()
    send(page, "Count from 1 to 20.")
    vote = page.get_by_role("button", name="Tie")
    expect(vote).to_be_visible(timeout=20_000)
    body = page.locator("#cbody")
    for secret in ("pocket-llava", "SGLang", "HF", "sglang-1", "hf-1"):
        expect(body).not_to_contain_text(secret)
    vote.click()
    expect(body).to_contain_text("SGLang")
    expect(body).to_contain_text("HF")


def test_the_cluster_is_seen_and_a_worker_drained_and_resumed(
    open_page: Open, cluster: Cluster
) -> None:
    page = open_page("/cluster")
    asked = {"model": "pocket-llava", "messages": user("What is Tandem for?")}
    httpx.post(f"{cluster.controller}/worker_generate_stream", json=asked, timeout=30)
    first_token = page.locator(".kpi", has_text="First token")
    expect(first_token).to_contain_text(re.compile(r"\d\.\d\d"))
    expect(page.locator(".kpi", has_text="Cache hits")).to_contain_text(re.compile(r"\d+%"))
    row = page.get_by_test_id("worker-hf-1")
    expect(row).to_contain_text("Ready")
    expect(page.locator(".ch svg")).to_have_count(3)
    expect(page.locator(".kpi").first).to_contain_text("tok/s")
    drain = row.get_by_role("button", name="Drain")
    drain.focus()
    page.wait_for_timeout(2500)  # a tick of the page leaves the focus where it is
    expect(drain).to_be_focused()
    page.once("dialog", lambda dialog: dialog.dismiss())
    drain.click()
    assert workers_of(cluster.controller)["hf-1"]["state"] == "ready"
    page.once("dialog", lambda dialog: dialog.accept())
    drain.click()
    expect(row).to_contain_text("Draining")
    look(page, "cluster")
    page.once("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="Resume").click()
    expect(row).to_contain_text("Ready")
    expect(page.locator(".ev")).to_contain_text("hf-1")


def test_gradios_client_asks_too(site: str) -> None:
    """In a process of its own: the client's threads are none of ours."""
    program = f"""
import json
from gradio_client import Client
client = Client({site!r}, verbose=False)
told = client.predict("What is Tandem for?", api_name="/ask")
print(json.dumps([told, client.predict(api_name="/models"), list(client.view_api(
    return_format="dict", print_info=False)["named_endpoints"])]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    told, models, endpoints = json.loads(done.stdout.splitlines()[-1])
    assert told.startswith("Tandem serves")
    assert models == ["pocket-llava"]
    assert sorted(endpoints) == ["/ask", "/models"], "no event of the page is an endpoint"


def test_pages_carry_safe_headers_and_say_nothing_to_other_hosts(site: str) -> None:
    response = httpx.get(site)
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert httpx.get(f"{site}/tandem/media/{'0' * 64}").status_code == 404
    assert httpx.get(f"{site}/tandem/ui.js").status_code == 200


def test_dark_is_chosen_and_stays(page: Page) -> None:
    expect(page.locator("body")).not_to_have_class(re.compile("dark"))
    page.get_by_role("button", name="Light or dark").click()
    expect(page.locator("body")).to_have_class(re.compile("dark"))
    page.reload()
    expect(page.locator("body")).to_have_class(re.compile("dark"))
    look(page, "chat-empty-dark")


def converse(page: Page, tmp_path: Path) -> None:
    """A short conversation with a picture, a list and a formula on the page."""
    path = tmp_path / "pair.png"
    picture("triangle", "orange").save(path)
    attach(page, path)
    send(page, "What do you see?")
    answered(page)
    send(page, "What is a lease?")
    answered(page, 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_every_screen_is_readable(open_page: Open, tmp_path: Path, scheme: str, size: str) -> None:
    options: dict[str, Any] = {"color_scheme": scheme} | (PHONE if size == "phone" else {})
    page = open_page("/", **options)
    expect(page.locator("#tx .ex")).to_have_count(4)
    check(page, f"chat-empty-{size}-{scheme}")
    converse(page, tmp_path)
    check(page, f"chat-{size}-{scheme}")
    if size == "phone":
        page.get_by_role("button", name="Chats", exact=True).tap()
        expect(page.locator("#convs .op").first).to_be_in_viewport()
        check(page, f"chat-list-{size}-{scheme}")
        page.locator("#stage").tap(position={"x": 370, "y": 400})
    page.locator("#open-settings").click()
    expect(page.get_by_label("System prompt")).to_be_in_viewport()
    check(page, f"chat-settings-{size}-{scheme}")
    page.goto(page.url.partition("?")[0] + "compare")
    expect(chosen(page, "B")).to_have_value(re.compile("pocket-llava"))
    send(page, "Count from 1 to 20.")
    expect(page.get_by_role("button", name="Tie")).to_be_visible(timeout=20_000)
    check(page, f"compare-{size}-{scheme}")
    page.goto(page.url.rpartition("/")[0] + "/cluster")
    expect(page.get_by_test_id("worker-sglang-1")).to_be_visible()
    check(page, f"cluster-{size}-{scheme}")


def check(page: Page, name: str) -> None:
    """A picture; nothing sticks out sideways; contrast AA, names and roles as axe sees them."""
    page.wait_for_timeout(300)  # the drawers slide
    look(page, name)
    wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wider <= 0, f"{name} is {wider} px too wide"
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa']})")
    faults = [
        (fault["id"], node["html"][:160], node["failureSummary"][:200])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
    assert not faults, f"{name}: {faults}"


def test_formulas_code_and_tables_are_drawn(open_page: Open, site: str) -> None:
    """Of an answer that nobody here would give, put into the database of a page of its own."""
    page = open_page("/")
    expect(page.locator("#tx .ex")).to_have_count(4)
    drawn = page.evaluate(
        """async () => {
          const element = document.createElement('x-tex');
          element.setAttribute('tex', '\\\\sqrt{x^2} \\\\href{javascript:alert(1)}{y}');
          document.body.append(element);
          for (let i = 0; i < 50 && !element.shadowRoot?.querySelector('.katex'); i++)
            await new Promise(done => setTimeout(done, 100));
          return [!!element.shadowRoot.querySelector('.katex .sqrt'),
                  element.shadowRoot.querySelectorAll('a[href^=javascript]').length];
        }"""
    )
    assert drawn == [True, 0]


def test_the_votes_are_exported(page: Page, site: str, tmp_path_factory: Any) -> None:
    send(page, "What is Tandem for?")
    answered(page).get_by_role("button", name="Good answer").click()
    expect(page.locator(f"{BOT} .on")).to_have_count(1)
    data = next(Path(str(tmp_path_factory.getbasetemp())).glob("page*/data"))
    done = subprocess.run(
        [sys.executable, "-m", "ui", "export", "--data-dir", str(data)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"type", "question", "answer", "settings"} <= lines[0].keys()
    assert "upvote" in {line["type"] for line in lines}
    assert not any("owner" in line for line in lines)
    expect(box(page)).to_be_visible()
