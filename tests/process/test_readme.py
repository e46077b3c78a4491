"""The README as a new user follows it: the demo's cluster on real engines, and its curl lines.

Then its processes are killed one by one, as a bad night would.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol.events import Failed, Finished
from tests.pictures import encoded, picture
from tests.processes import ROOT, until
from tests.streams import Answer, ask, streaming, user

START_TIMEOUT_S = 300  # SGLang imports for half a minute, longer on a busy machine
pytestmark = pytest.mark.timeout(2 * START_TIMEOUT_S)

# What `python -m cluster up` starts without a file, but on free ports.
DEMO = """
controller: {port: auto}
workers:
  - {kind: sglang, model-path: models/pocket-llava, name: sglang-1}
  - {kind: hf, model-path: models/pocket-llava, name: hf-1}
"""


class Demo:
    """The demo's cluster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "cluster.yaml"
        self._file.write_text(DEMO)
        self._output = folder / "output"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                self._command("up", str(self._file)), cwd=ROOT, stdout=output, stderr=output
            )

    def _command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "cluster", *args, "--run-dir", str(self._folder / "run")]

    def said(self) -> str:
        return self._output.read_text()[-4000:]

    def status(self) -> dict[str, Any]:
        found = subprocess.run(
            self._command("status", "--json"), cwd=ROOT, capture_output=True, check=False
        )
        status: dict[str, Any] = json.loads(found.stdout or b"{}")
        return status

    def wait_ready(self) -> None:
        assert self._process.poll() is None, self.said()
        until(
            lambda: self.status().get("ready"),
            timeout_s=START_TIMEOUT_S,
            what="a whole cluster",
            say=self.said,
        )

    @property
    def address(self) -> str:
        address: str = self.status()["controller_address"]
        return address

    def pid(self, name: str) -> int:
        pids: dict[str, int] = {p["name"]: p["pid"] for p in self.status()["processes"]}
        return pids[name]

    def stop(self) -> int:
        """Ctrl-C."""
        self._process.send_signal(2)
        return self._process.wait(30)

    def close(self) -> None:
        if self._process.poll() is None:
            self.stop()
        subprocess.run(self._command("down"), cwd=ROOT, capture_output=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("demo"))
    try:
        demo.wait_ready()
        yield demo
    finally:
        demo.close()


def curls() -> list[str]:
    """The curl commands of the README."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("curl ")]


@pytest.mark.parametrize("number", range(4))
def test_the_readmes_curl_works_as_pasted(demo: Demo, number: int) -> None:
    assert len(curls()) == 4
    command = curls()[number].replace("http://127.0.0.1:21001", demo.address)
    found = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.count("data: ") > 3, found.stdout
    if "docs/examples" in command:
        words = re.findall(r'"content":"([^"]*)"', found.stdout)
        assert "red" in "".join(words)
    assert "[DONE]" in found.stdout or "event: finished" in found.stdout


def test_what_up_prints_can_be_pasted(demo: Demo) -> None:
    lines = [line.strip() for line in demo.said().splitlines() if line.strip().startswith("curl ")]
    assert len(lines) == 2
    for line in lines:
        found = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "[DONE]" in found.stdout, found.stdout


def count(demo: Demo, kind: str) -> Answer:
    return ask(
        demo.address,
        model="pocket-llava",
        kind=kind,
        messages=user("Count from 1 to 20."),
        temperature=0,
        max_new_tokens=60,
    )


def loaded_ids(address: str) -> set[str]:
    workers = httpx.get(f"{address}/cluster").json()["workers"]
    return {worker["worker_id"] for worker in workers if worker["state"] == "ready"}


def wait_back(demo: Demo, killed: int, name: str) -> None:
    """Until another process does the work of the killed one."""
    until(
        lambda: {"sglang-1", "hf-1"} <= loaded_ids(demo.address) and demo.pid(name) != killed,
        timeout_s=START_TIMEOUT_S,
        what=f"{name} is back",
        say=demo.said,
    )


@pytest.mark.parametrize("name", ["hf-1", "sglang-1"])
def test_a_killed_worker_ends_its_stream_with_its_type_and_comes_back(
    demo: Demo, name: str
) -> None:
    kind = name.partition("-")[0]
    other = "hf" if kind == "sglang" else "sglang"
    pid = demo.pid(name)
    family = psutil.Process(pid).children(recursive=True)
    folders = {Path(child.environ()["TMPDIR"]) for child in family if is_server(child)}
    assert len(folders) == (kind == "sglang")
    asked: dict[str, Any] = {
        "model": "pocket-llava",
        "messages": user("Count from 1 to 100."),
        "temperature": 0,
        "max_new_tokens": 3000,
    }
    with streaming(demo.address, **asked, kind=kind) as events:
        seen = [next(events) for _ in range(3)]
        os.kill(pid, 9)
        seen += events
    last = seen[-1]
    assert isinstance(last, Finished | Failed)
    if isinstance(last, Failed):
        assert last.code == "upstream_lost"
    assert count(demo, other).finished.reason == "stop", "the other kind serves on"
    # Without a kind asked for, nobody notices: the one that lives takes over.
    image = encoded(picture("circle", "blue"))
    answer = ask(
        demo.address,
        model="pocket-llava",
        messages=user("<image>What color is the circle?"),
        images=[image],
        temperature=0,
    )
    assert "blue" in answer.text
    until(lambda: not any(child.is_running() for child in family), what="no orphan is left")
    assert not any(folder.exists() for folder in folders), "no litter is left"
    wait_back(demo, pid, name)
    assert count(demo, kind).finished.reason == "stop"
    assert name in demo.said()


def is_server(process: psutil.Process) -> bool:
    return "workers.sglang.server.launch" in process.cmdline()


def test_a_killed_engine_ends_the_worker_with_a_code_of_its_own(demo: Demo) -> None:
    """One process of the engine's three is enough: the one that computes."""
    pid = demo.pid("sglang-1")
    family = psutil.Process(pid).children(recursive=True)
    scheduler = next(child for child in family if child.cmdline()[0] == "sglang::scheduler")
    scheduler.kill()
    wait_back(demo, pid, "sglang-1")
    assert count(demo, "sglang").finished.reason == "stop"
    assert "lost its engine (exit code 70)" in demo.said()


def test_a_killed_controller_is_back_with_its_workers(demo: Demo) -> None:
    pid = demo.pid("controller")
    os.kill(pid, 9)
    wait_back(demo, pid, "controller")
    for kind in ("hf", "sglang"):
        assert count(demo, kind).finished.reason == "stop"


def test_ctrl_c_stops_everything(demo: Demo) -> None:
    status = demo.status()
    family = [psutil.Process(process["pid"]) for process in status["processes"]]
    family += [child for process in family for child in process.children(recursive=True)]
    assert demo.stop() == 0
    until(lambda: not any(process.is_running() for process in family), what="nothing is left")
