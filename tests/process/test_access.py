"""Access control as a person meets it: refused starts, keys from the command line, quiet logs."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import certificate
from tests.processes import ROOT, running, until
from transport.exits import EXIT_USAGE

pytestmark = pytest.mark.timeout(120)

TOKEN = "the-token-of-this-cluster"
ASKED = {"model": "echo", "prompt": "hello"}


def call(module: str, *args: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *args],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("module", ["controller", "workers.echo"])
def test_no_start_on_every_address_without_a_token(module: str) -> None:
    found = call(module, "--host", "0.0.0.0", "--port", "0")
    assert found.returncode == EXIT_USAGE
    assert "other machines could reach 0.0.0.0" in found.stderr
    assert "export TANDEM_CLUSTER_TOKEN=$(" in found.stderr
    assert "Traceback" not in found.stderr


def test_files_that_cannot_be_used_are_a_sentence(tmp_path: Path) -> None:
    for flags, words in (
        (("--api-key-file", str(tmp_path / "none.json")), "There is no key file"),
        (("--ssl-certfile", str(tmp_path / "none.pem")), "cannot be read"),
    ):
        found = call("controller", "--port", "0", *flags)
        assert found.returncode == EXIT_USAGE
        assert words in found.stderr
        assert "Traceback" not in found.stderr


def test_keys_help_and_mistakes(tmp_path: Path) -> None:
    found = call("controller", "keys", "--help")
    assert found.returncode == 0
    assert "python -m controller keys add NAME" in found.stdout
    assert "keys --help" in call("controller", "--help").stdout
    for argv in (["list"], ["remove", "ann"], ["add"], ["frob"], []):
        found = call("controller", "keys", *argv, folder=tmp_path)
        assert found.returncode == EXIT_USAGE, argv
        assert "Traceback" not in found.stderr
        assert found.stdout == ""


def test_a_key_from_the_command_line_to_an_answer(tmp_path: Path) -> None:
    made = call("controller", "keys", "add", "ann", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    file = tmp_path / "tandem-keys.json"
    assert file.stat().st_mode & 0o777 == 0o600
    exported = {"TANDEM_CLUSTER_TOKEN": TOKEN, "TANDEM_API_KEY_FILE": str(file)}
    flags = ("--port", "0", "--log-level", "DEBUG")
    with running(tmp_path, "controller", *flags, env=exported) as controller:
        front = controller.wait_ready()
        to_front = ("--port", "0", "--controller-address", front, "--log-level", "DEBUG")
        with running(tmp_path, "workers.echo", *to_front, env=exported) as worker:
            address = worker.wait_ready()

            def answered(credential: str, url: str = front) -> int:
                headers = {"authorization": f"Bearer {credential}"}
                url = f"{url}/worker_generate_stream"
                return httpx.post(url, json=ASKED, headers=headers).status_code

            until(lambda: answered(key) == 200, what="the worker is registered")
            assert answered("tdm-wrong") == 401
            assert answered(key, address) == 401
            assert answered(TOKEN, address) == 200
            assert call("controller", "keys", "remove", "ann", folder=tmp_path).returncode == 0
            until(lambda: answered(key) == 401, what="the key is refused")
            finished = [e for e in controller.entries() if e["event"] == "finished"]
            assert {e.get("key") for e in finished} == {"ann"}
            for process in (controller, worker):
                text = process.log.read_text()
                assert "settings" in text
                for secret in (key, TOKEN, "tdm-wrong"):
                    assert secret not in text


def test_https(tmp_path: Path) -> None:
    files = certificate.make(tmp_path)
    flags = ("--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key))
    with running(tmp_path, "controller", "--port", "0", *flags) as controller:
        front = controller.address()
        assert front.startswith("https://")
        to_front = ("--port", "0", "--controller-address", front)
        trust = {"SSL_CERT_FILE": str(files.certificate)}
        with running(tmp_path, "workers.echo", *to_front, env=trust) as worker:
            worker.wait_ready()
            trusting = ssl.create_default_context(cafile=files.certificate)
            with httpx.Client(base_url=front, verify=trusting) as client:
                until(lambda: client.get("/v1/models").json()["data"], what="it is registered")
                answer = client.post("/worker_generate_stream", json=ASKED)
                assert answer.status_code == 200
