"""FastChat's and LLaVA's own processes, from an environment of their own (see the Makefile)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import orjson

from tests.processes import ROOT, until

HOME = ROOT / ".venv-fastchat"
PYTHON = HOME / "bin" / "python"
LLAVA = Path(__file__).parent / "run_llava.py"
PYDANTIC_1 = {"PYTHONPATH": str(HOME / "pydantic1")}
"""For FastChat's OpenAI server, whose streams break with pydantic 2."""

_TETHER = ROOT / "cluster" / "tether.py"
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "*",
}


class Other:
    """A process of theirs; it works, and writes its own log files, in ``folder``."""

    def __init__(self, folder: Path, *args: object, env: dict[str, str] | None = None) -> None:
        self.log = folder / f"{len(list(folder.glob('*.out')))}.out"
        self._what = " ".join(map(str, args[:2]))
        with self.log.open("wb") as output:
            self._popen = subprocess.Popen(
                [PYTHON, _TETHER, str(os.getpid()), *map(str, args)],
                cwd=folder,
                env={**os.environ, **_ENVIRONMENT, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_listening(self, address: str, timeout_s: float = 90) -> None:
        def listening() -> bool:
            assert self._popen.poll() is None, f"{self._what} has ended:\n{self.text()[-3000:]}"
            return httpx.get(address, trust_env=False).status_code > 0

        until(listening, timeout_s=timeout_s, what=self._what, say=lambda: self.text()[-3000:])

    def kill(self) -> None:
        """At once: the heartbeat threads of theirs outlive a SIGTERM."""
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


@contextmanager
def other(
    folder: Path, *args: object, at: str = "", env: dict[str, str] | None = None
) -> Iterator[Other]:
    """A process of theirs that ends with the block; it listens ``at`` an address, if given."""
    folder.mkdir(parents=True, exist_ok=True)
    process = Other(folder, *args, env=env)
    try:
        if at:
            process.wait_listening(at)
        yield process
    finally:
        process.kill()


def finished(folder: Path, *args: object) -> str:
    """What a program of theirs prints until it ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        [PYTHON, *map(str, args)],
        cwd=folder,
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def ask(address: str, path: str, **body: object) -> Any:
    """The JSON that a POST is answered with."""
    response = httpx.post(f"{address}{path}", json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def frames(address: str, **body: object) -> list[dict[str, Any]]:
    """The NUL-delimited frames of a generation."""
    response = httpx.post(
        f"{address}/worker_generate_stream", json=body, timeout=30, trust_env=False
    )
    return [orjson.loads(frame) for frame in response.content.split(b"\0") if frame]
