"""FastChat's own controller, servers and worker with ours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pytest

from tests.interop import pocket_text
from tests.interop.others import HOME, PYDANTIC_1, PYTHON, ask, frames, other
from tests.pictures import encoded
from tests.pictures import picture as drawn
from tests.processes import ROOT, running, until, workers_of
from tests.streams import ask as stream
from transport.process import free_port

pytestmark = pytest.mark.timeout(180)

MODEL = "pocket-llava"
QUESTIONS = ["What is Tandem?", "Which port does the controller listen on?"]


def local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Iterator[str]:
    """The address of FastChat's controller."""
    port = free_port()
    args = ("--host", "127.0.0.1", "--port", port)
    with other(folder, "-m", "fastchat.serve.controller", *args, at=f"{local(port)}/docs"):
        yield local(port)


@pytest.fixture(scope="module")
def worker(folder: Path, controller: str, theirs: str) -> Iterator[str]:
    """The address of our worker with the embedded model, at both controllers."""
    model = ROOT / "models" / MODEL
    args = ("--model-path", str(model), "--model-name", MODEL, "--port", "0")
    both = ("--controller-address", f"{controller},{theirs}")
    with running(folder, "workers.hf", *args, *both) as process:
        address = process.wait_ready(timeout_s=90)
        both_serve = [controller, theirs]
        until(lambda: all(MODEL in ask(each, "/list_models")["models"] for each in both_serve))
        yield address


@pytest.fixture(scope="module")
def servers(folder: Path, controller: str, theirs: str, worker: str) -> Iterator[dict[str, str]]:
    """FastChat's OpenAI server, once before each controller."""
    ports = {"ours": free_port(), "theirs": free_port()}
    before = {"ours": controller, "theirs": theirs}

    def args(name: str) -> tuple[object, ...]:
        module = ("-m", "fastchat.serve.openai_api_server", "--host", "127.0.0.1")
        return (*module, "--port", ports[name], "--controller-address", before[name])

    def at(name: str) -> str:
        return f"{local(ports[name])}/docs"

    with (
        other(folder, *args("ours"), env=PYDANTIC_1) as first,
        other(folder, *args("theirs"), at=at("theirs"), env=PYDANTIC_1),
    ):
        first.wait_listening(at("ours"))
        yield {name: local(port) for name, port in ports.items()}


@pytest.fixture(params=["ours", "theirs"])
def server(request: pytest.FixtureRequest, servers: dict[str, str]) -> str:
    return servers[request.param]


def chunks(server: str, path: str, **body: object) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    response = httpx.post(
        f"{server}{path}", json=body | {"stream": True}, timeout=60, trust_env=False
    )
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", response.text
    return [json.loads(line) for line in lines[:-1]]


def answer_of(controller: str, messages: list[dict[str, Any]]) -> str:
    """What our own way of asking gives."""
    return stream(controller, model=MODEL, messages=messages, temperature=0, max_new_tokens=40).text


# ---------------------------------------------------------------- its OpenAI server


def conversations() -> list[list[dict[str, Any]]]:
    one = [{"role": "user", "content": QUESTIONS[0]}]
    more = [{"role": "assistant", "content": "A server."}, {"role": "user", "content": "Why?"}]
    return [one, [*one, *more], [{"role": "system", "content": "Answer briefly."}, *one]]


@pytest.mark.parametrize("messages", conversations(), ids=["one", "several", "system"])
def test_chat(server: str, controller: str, messages: list[dict[str, Any]]) -> None:
    expected = answer_of(controller, messages)
    asked = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = ask(server, "/v1/chat/completions", **asked)
    assert whole["choices"][0]["message"]["content"] == expected
    assert whole["usage"]["completion_tokens"] > 0
    streamed = chunks(server, "/v1/chat/completions", **asked)
    said = [chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed]
    assert "".join(said) == expected
    assert streamed[-1]["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("echo", [False, True])
def test_completion(server: str, controller: str, echo: bool) -> None:
    prompt = "<s><|user|>What is Tandem?<|assistant|>"
    asked = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 40, "echo": echo}
    expected = (prompt if echo else "") + answer_of(controller, conversations()[0])
    assert ask(server, "/v1/completions", **asked)["choices"][0]["text"] == expected
    streamed = chunks(server, "/v1/completions", **asked)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == expected


def test_logprobs_of_a_completion(server: str) -> None:
    asked = {"model": MODEL, "prompt": "<s><|user|>Hi<|assistant|>", "temperature": 0}
    choice = ask(server, "/v1/completions", **asked, max_tokens=5, logprobs=2)["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) > 0
    assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])


def test_its_other_questions(server: str) -> None:
    models = httpx.get(f"{server}/v1/models", timeout=30, trust_env=False).json()["data"]
    assert MODEL in [model["id"] for model in models]
    prompts = [{"model": MODEL, "prompt": "What is Tandem?", "max_tokens": 10}]
    (checked,) = ask(server, "/api/v1/token_check", prompts=prompts)["prompts"]
    assert checked["fits"]
    assert checked["contextLength"] == 4096
    assert 2 < checked["tokenCount"] < 15


def test_what_does_not_fit_is_said(server: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "far " * 9000}]}
    response = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    assert response.status_code == 400
    assert "maximum context length is 4096" in response.json()["message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_refusal_reaches_its_client(servers: dict[str, str], streamed: bool) -> None:
    """FastChat looks at no status: a refusal of ours comes as its ``error_code``."""
    asked = {"model": MODEL, "prompt": "Hi", "temperature": 1.0, "max_tokens": 4, "logprobs": 21}
    if streamed:
        said = chunks(servers["ours"], "/v1/completions", **asked)[0]["text"]
    else:
        response = httpx.post(
            f"{servers['ours']}/v1/completions", json=asked, timeout=30, trust_env=False
        )
        assert response.status_code == 400
        said = response.json()["message"]
    assert "logprobs" in said


def test_pictures_with_a_template_that_has_colons(folder: Path, controller: str) -> None:
    """FastChat 0.2.36 writes pictures in that style alone; see docs/interop.md."""
    port = free_port()
    echo = ("--port", "0", "--model-name", "seeing", "--controller-address", controller)
    module = ("-m", "fastchat.serve.openai_api_server", "--host", "127.0.0.1", "--port", port)
    address = ("--controller-address", controller)
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(drawn())}"}},
    ]
    with (
        running(folder, "workers.echo", *echo) as process,
        other(folder, *module, *address, at=f"{local(port)}/docs", env=PYDANTIC_1),
    ):
        process.wait_ready()
        until(lambda: "seeing" in ask(controller, "/list_multimodal_models")["models"])
        messages = [{"role": "user", "content": parts}]
        answer = ask(local(port), "/v1/chat/completions", model="seeing", messages=messages)
    said = answer["choices"][0]["message"]["content"]
    assert said == "USER: <image>\nWhat is it? ASSISTANT:"


# ---------------------------------------------------------------- its conversation


def test_its_conversation_writes_our_prompt(worker: str) -> None:
    """FastChat's own code joins the turns as the model's template does."""
    conv = ask(worker, "/worker_get_conv_template")["conv"]
    code = """
import json, sys
from fastchat.conversation import Conversation, SeparatorStyle
fields, messages = json.loads(sys.argv[1])
fields["sep_style"] = SeparatorStyle(fields["sep_style"])
conversation = Conversation(**fields)
for role, text in messages:
    conversation.append_message(conversation.roles[role], text)
print(conversation.get_prompt(), end="")
"""
    turns: list[tuple[int, str | None]] = [
        (0, "Hi"),
        (1, "Hello."),
        (0, "What is Tandem?"),
        (1, None),
    ]
    run = subprocess.run(
        [PYTHON, "-c", code, json.dumps([conv, turns])],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    template = jinja2.Template((ROOT / "models" / MODEL / "chat_template.jinja").read_text())
    messages = [
        {"role": ("user", "assistant")[role], "content": text} for role, text in turns if text
    ]
    assert run.stdout == template.render(messages=messages, add_generation_prompt=True)


# ---------------------------------------------------------------- its Gradio server


def gradio_chat(address: str, text: str) -> list[list[str]]:
    """Press Enter on the page and return the chat: what its JavaScript would post and read."""
    client = httpx.Client(base_url=address, timeout=60, trust_env=False)
    config = client.get("/config").json()
    box = next(
        found["id"]
        for found in config["components"]
        if found["props"].get("elem_id") == "input_box"
    )
    enter = next(found for found in config["dependencies"] if [box, "submit"] in found["targets"])
    reply = next(found for found in config["dependencies"] if found["trigger_after"] == enter["id"])
    model = client.get("/config").json()["components"]
    chosen = next(c["props"]["value"] for c in model if c["type"] == "dropdown")

    def call(number: int, data: list[object]) -> list[Any]:
        joined = {"fn_index": number, "data": data, "session_hash": "abc", "event_data": None}
        client.post("/queue/join", json=joined).raise_for_status()
        with client.stream("GET", "/queue/data", params={"session_hash": "abc"}) as events:
            for line in events.iter_lines():
                message = json.loads(line[6:]) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    found: list[Any] = message["output"]["data"]
                    return found
        raise AssertionError("the stream ended")

    call(enter["id"], [None, chosen, text, None])
    chat: list[list[str]] = call(reply["id"], [None, 0.0, 1.0, 1024])[1]
    return chat


def test_its_gradio_server_before_our_controller(folder: Path) -> None:
    """It writes the prompt by a template that it chooses by the model's name."""
    port = free_port()
    with running(folder, "controller", "--port", "0") as ours:
        controller = ours.wait_ready()
        echo = ("--port", "0", "--model-name", "vicuna-echo", "--controller-address", controller)
        module = ("-m", "fastchat.serve.gradio_web_server", "--host", "127.0.0.1")
        args = ("--port", port, "--controller-url", controller)
        with running(folder, "workers.echo", *echo) as process:
            process.wait_ready()
            until(lambda: ask(controller, "/list_language_models")["models"] == ["vicuna-echo"])
            with other(folder, *module, *args, at=local(port)):
                page = httpx.get(local(port), timeout=30, trust_env=False)
                assert "Chat with Open Large Language Models" in page.text
                chat = gradio_chat(local(port), "Hello you")
    ((question, answer),) = chat
    assert question == "Hello you"
    assert answer.endswith("USER: Hello you ASSISTANT:"), "the echo of its prompt"


# ---------------------------------------------------------------- its worker


@pytest.fixture(scope="module")
def their_worker(folder: Path, controller: str) -> Iterator[str]:
    """FastChat's worker with the language model of ours, at our controller; its model's name."""
    port = free_port()
    pocket_text.write(folder / "pocket-text")
    flags = {"host": "127.0.0.1", "port": port, "worker-address": local(port), "device": "cpu"}
    flags |= {"controller-address": controller, "model-path": folder / "pocket-text"}
    flags |= {"model-names": "pocket-text", "dtype": "float32"}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    module = ("-m", "fastchat.serve.model_worker")
    with other(folder, *module, *arguments, at=f"{local(port)}/docs") as process:
        until(
            lambda: "pocket-text" in ask(controller, "/list_models")["models"],
            timeout_s=30,
            what="FastChat's worker is ready",
            say=lambda: str(workers_of(controller)) + process.text()[-2000:],
        )
        yield "pocket-text"


@pytest.mark.parametrize("question", QUESTIONS)
def test_its_worker_answers(controller: str, worker: str, their_worker: str, question: str) -> None:
    """The same weights and the same prompt: the same answer as from our worker."""
    prompt = f"<s><|user|>{question}<|assistant|>"
    asked: dict[str, Any] = {"prompt": prompt, "temperature": 0, "max_new_tokens": 40}
    answer = stream(controller, model=their_worker, **asked)
    assert answer.text.strip() == stream(controller, model=MODEL, **asked).text.strip()
    assert answer.finished.prompt_tokens > 0
    completion = ask(
        controller, "/v1/completions", model=their_worker, prompt=prompt, temperature=0,
        max_tokens=40,
    )  # fmt: skip
    assert completion["choices"][0]["text"] == answer.text
    stopped = stream(controller, model=their_worker, **asked, stop=[answer.text[9:12], "nowhere"])
    assert stopped.text == answer.text[: answer.text.index(answer.text[9:12])]


def test_its_worker_behind_its_own_wire(controller: str, their_worker: str) -> None:
    asked: dict[str, Any] = {"model": their_worker, "prompt": "<s><|user|>Hi<|assistant|>"}
    asked |= {"temperature": 0, "max_new_tokens": 10, "top_k": -1, "logprobs": None, "stop": []}
    streamed = frames(controller, **asked, echo=False)[-1]
    whole = ask(controller, "/worker_generate", **asked, echo=False)
    assert streamed["text"] == whole["text"]
    assert whole["error_code"] == 0
    assert ask(controller, "/model_details", model=their_worker) == {"context_length": 4096}
    counted = ask(controller, "/count_token", model=their_worker, prompt="<s><|user|>Hi")
    assert counted == {"count": 3, "error_code": 0}
    conv = ask(controller, "/worker_get_conv_template", model=their_worker)["conv"]
    assert conv["name"] == "one_shot", "FastChat chooses by the model's name"
    assert their_worker not in ask(controller, "/list_multimodal_models")["models"]


def test_it_is_not_shown_pictures(controller: str, their_worker: str) -> None:
    body = {"model": their_worker, "prompt": "<image>", "images": [encoded(drawn())]}
    response = httpx.post(
        f"{controller}/worker_generate_stream", json=body, timeout=30, trust_env=False
    )
    assert response.json()["error"]["code"] == "unsupported"


def test_the_environment_is_the_locked_one() -> None:
    """FastChat's processes are FastChat's, not something of ours with its name."""
    found = list(HOME.glob("lib/python*/site-packages/fschat-0.2.36.dist-info"))
    assert len(found) == 1
