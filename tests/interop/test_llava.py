"""LLaVA's own client, controller and worker with ours, over their wire."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.interop.others import LLAVA, Other, ask, finished, frames, other
from tests.interop.run_llava import REPLY
from tests.processes import running, until, workers_of
from tests.streams import ask as stream
from transport.process import free_port

pytestmark = pytest.mark.timeout(120)

CONTROLLER = (LLAVA, "llava.serve.controller", "--port")


def local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def echo(folder: Path, controller: str) -> Iterator[str]:
    """The address of an echo worker at our controller."""
    args = ("--port", "0", "--controller-address", controller)
    with running(folder, "workers.echo", *args) as process:
        address = process.wait_ready()
        until(lambda: "echo" in ask(controller, "/list_models")["models"])
        yield address


# ---------------------------------------------------------------- its client


@pytest.mark.parametrize("where", ["controller", "worker"])
def test_its_client(tmp_path: Path, controller: str, echo: str, where: str) -> None:
    """``test_message.py`` stops at the first blank, and prints the last word of each frame."""
    address = ("--controller-address", controller) if where == "controller" else ()
    address = address or ("--worker-address", echo)
    module = (LLAVA, "llava.serve.test_message")
    printed = finished(tmp_path, *module, *address, "--model-name", "echo", "--message", "Hi")
    assert "USER:\nHi\n" in printed
    assert printed.rstrip("\n").split("\n")[-1].strip("\r") == "A", "the first word of the prompt"
    if where == "controller":
        assert f"worker_addr: {controller}" in printed


# ---------------------------------------------------------------- its controller


def test_our_worker_at_its_controller(tmp_path: Path) -> None:
    port = free_port()
    address = local(port)

    def served() -> bool:
        return bool(ask(address, "/list_models")["models"] == ["echo"])

    worker = ("workers.echo", "--port", "0", "--controller-address", address)
    with running(tmp_path, *worker) as process:
        process.wait_ready()
        with other(tmp_path, *CONTROLLER, port, at=f"{address}/docs") as theirs:
            until(served, what="registered", say=process.tail)
            answer = frames(address, model="echo", prompt="Hi there", stop="</s>")
            assert answer[-1]["text"] == "Hi thereHi there"
            assert {frame["error_code"] for frame in answer} == {0}
            overflow = frames(address, model="echo", prompt="x" * 9000)
            assert overflow[-1]["error_code"] == 413
            assert "context" in overflow[-1]["text"]
            assert "Register done" in theirs.text()
        with other(tmp_path, *CONTROLLER, port, at=f"{address}/docs") as theirs:
            until(served, what="registered again after its restart", say=process.tail)
            httpx.post(f"{process.address()}/drain", trust_env=False)
            until(lambda: "Receive heart beat" in theirs.text(), what="a heartbeat")


# ---------------------------------------------------------------- its worker


@pytest.fixture(scope="module")
def worker(folder: Path, controller: str) -> Iterator[Other]:
    """LLaVA's worker with a stand-in for its model, at our controller."""
    port = free_port()
    flags = {"host": "127.0.0.1", "port": port, "worker-address": local(port), "device": "cpu"}
    flags |= {"controller-address": controller, "model-path": "llava-standin"}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    module = (LLAVA, "llava.serve.model_worker")
    with other(folder, *module, *arguments, at=f"{local(port)}/docs") as process:
        until(
            lambda: "llava-standin" in ask(controller, "/list_models")["models"],
            timeout_s=30,
            what="LLaVA's worker is ready",
            say=lambda: str(workers_of(controller)) + process.text()[-2000:],
        )
        yield process


def said(controller: str, **fields: Any) -> str:
    answer = stream(controller, model="llava-standin", **fields)
    assert answer.finished.reason == "stop"
    return answer.text


def picture() -> str:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_its_worker_answers(controller: str, worker: Other) -> None:
    assert said(controller, prompt="What? ", max_new_tokens=200) == REPLY
    assert said(controller, prompt="What? ", stop=".") == REPLY.partition(".")[0]
    assert "Send heart beat" in worker.text(), "it sends one with each request"


def test_its_worker_and_several_stop_strings(controller: str, worker: Other) -> None:
    """It takes one; the controller watches for the others."""
    assert (
        said(controller, prompt="What?", stop=["nowhere", "circle. It"])
        == (REPLY.partition("circle. It")[0])
    )


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_its_worker_sees(controller: str, worker: Other, prefix: str) -> None:
    asked: dict[str, Any] = {
        "prompt": "<image>\nWhat?",
        "images": [prefix + picture()],
        "max_new_tokens": 200,
    }
    assert said(controller, **asked) == f"1 seen. {REPLY}"


def test_its_worker_behind_its_own_wire(controller: str, worker: Other) -> None:
    address = ask(controller, "/get_worker_address", model="llava-standin")["address"]
    assert address == controller
    answer = frames(address, model="llava-standin", prompt="Q", stop="</s>")
    assert answer[-1]["text"] == "Q" + REPLY


def test_its_error_is_a_typed_failure(controller: str, worker: Other) -> None:
    response = httpx.post(
        f"{controller}/worker_generate_stream",
        json={"model": "llava-standin", "prompt": "<image>", "images": ["bm90IGEgcGljdHVyZQ=="]},
        headers={"accept": "text/event-stream"},
        timeout=30,
        trust_env=False,
    )
    assert response.json()["error"]["code"] == "engine_failed"


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "chat"),
        ({"prompt": "Hi", "top_k": 5}, "sampling"),
        ({"prompt": "Hi", "seed": 1}, "seed"),
    ],
)
def test_it_is_not_asked_for_what_it_cannot_do(
    controller: str, worker: Other, fields: dict[str, object], missing: str
) -> None:
    body = {"model": "llava-standin"} | fields
    response = httpx.post(
        f"{controller}/worker_generate_stream", json=body, timeout=30, trust_env=False
    )
    assert response.json()["error"]["code"] == "unsupported"
    assert missing in response.json()["error"]["message"]


def test_it_does_not_know_fastchats_questions(controller: str, worker: Other) -> None:
    response = httpx.post(
        f"{controller}/model_details", json={"model": "llava-standin"}, trust_env=False
    )
    assert response.json()["error"]["code"] == "unsupported"


def test_beside_our_worker_and_its_end(folder: Path, controller: str, worker: Other) -> None:
    """The last of this file: it kills LLaVA's worker."""
    args = ("--port", "0", "--model-name", "llava-standin", "--controller-address", controller)
    with running(folder, "workers.echo", *args) as ours:
        ours.wait_ready()
        until(
            lambda: (
                sum(
                    "llava-standin" in found["models"] and found["state"] == "ready"
                    for found in workers_of(controller).values()
                )
                == 2
            )
        )
        answers = Counter(said(controller, prompt="Hm", max_new_tokens=200) for _ in range(40))
        assert set(answers) == {REPLY, "Hm"}
        assert min(answers.values()) >= 5, "neither is starved"
        chat = [{"role": "user", "content": "Hm"}]
        assert {said(controller, messages=chat) for _ in range(5)} == {"Hm"}
        worker.kill()
        assert {said(controller, prompt="Hm") for _ in range(5)} == {"Hm"}
        until(
            lambda: not any(w["kind"] == "llava" for w in workers_of(controller).values()),
            what="LLaVA's worker is forgotten",
        )
