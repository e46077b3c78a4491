"""Requests made from the controller's own description of itself, right ones and wrong ones."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.progress import Progress, TaskID
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation

from bench.fuzz import pictures
from bench.fuzz.findings import Findings, bar, until_stopped
from bench.fuzz.verdict import STREAMED, Fault, outcome
from bench.processes import Harness, Running
from bench.results import Keep, record
from bench.soak.cluster import leftovers, wait_ready

CASE_TIMEOUT_S = 60.0
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
BATCH = 100  # cases of one operation in a row, so that all see what the others leave behind
_PARTS = ("method", "url", "headers", "params", "cookies", "data", "json")
_HEADERS = ("Content-Type", "Accept")
_BARE = str.maketrans("", "", "{}")
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
"""HEAD has no body to look at."""
UNKNOWN = ("/", "/v1", "/v1/", "/v1/nothing", "/%00", "//", "/workers//drain", "/cluster/", "/é")


class _Enough(Exception):
    """Ctrl-C within a case, which Hypothesis would take for a failure of it."""


class _Run:
    """Every operation of one controller in turn."""

    def __init__(self, controller: Running, worker: Running, model: str, worker_id: str) -> None:
        self.findings = Findings()
        self.left_out: dict[str, str] = {}
        self._controller = controller
        self._worker = worker
        self._model = model
        self._worker_id = worker_id
        self._session = requests.Session()
        self._session.trust_env = False
        self._sent = 0

    def operations(self) -> list[APIOperation[Any, Any, Any, Any]]:
        schema = schemathesis.openapi.from_url(f"{self._controller.address}/openapi.json")
        schema.config.max_stream_events = 1 << 20  # it would hang up after the 20th, unseen
        return [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]

    def go(self, cases: int, number: int) -> None:
        operations = self.operations()
        with bar() as progress:
            task = progress.add_task("openapi", total=cases, note="")
            batch = max(1, min(BATCH, cases // (2 * len(operations))))
            while self.findings.cases < cases and operations:
                for operation in operations:
                    for mode in MODES:
                        if self.findings.cases < cases:
                            number += 1
                            self._some(operation, mode, number, batch, (progress, task))
                self._good()
                operations = [one for one in operations if one.label not in self.left_out]

    def other_methods(self) -> None:
        """What no description allows: other methods, and paths that are not there."""
        described = {(one.path.translate(_BARE), one.method.upper()) for one in self.operations()}
        paths = sorted({path for path, _ in described})
        for path in (*paths, *UNKNOWN):
            for method in METHODS:
                if (path, method) in described:
                    continue
                url = self._controller.address + path
                answer = self._session.request(method, url, timeout=CASE_TIMEOUT_S)
                route = f"{method} {path}"
                try:
                    code = outcome(path, answer.status_code, "application/json", answer.content)
                except Fault as fault:
                    code = "fault"
                    curl = self.findings.curl(method, url, b"", {})
                    self.findings.fault("other methods and paths", route, str(fault), curl)
                self.findings.count("other methods and paths", code)

    def _some(
        self,
        operation: APIOperation[Any, Any, Any, Any],
        mode: GenerationMode,
        number: int,
        count: int,
        shown: tuple[Progress, TaskID],
    ) -> None:
        """About ``count`` cases of one operation; it may have fewer different ones."""
        progress, task = shown

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def each(case: Any) -> None:
            self._case(case, mode)
            progress.update(
                task, completed=self.findings.cases, note=f"{self.findings.faults} faults"
            )

        before = self.findings.cases
        try:
            each()
        except _Enough as exc:
            raise KeyboardInterrupt from exc
        except Exception as exc:  # noqa: BLE001 - there may be no wrong request of a kind
            why = f"{mode.value}: {type(exc).__name__}: {exc}"
            if self.findings.cases == before and mode is GenerationMode.POSITIVE:
                self.left_out[operation.label] = why[:300]

    def _case(self, case: Any, mode: GenerationMode) -> None:
        self._sent += 1
        self._aim(case)
        route = f"{case.method.upper()} {case.operation.path}"
        try:
            code = self._answered(case)
            if code == "engine_failed":
                raise Fault("engine_failed: nothing here may break")
        except Fault as fault:
            code = "fault"
            self.findings.fault(route, f"{mode.value} data", str(fault), self._again(case))
        except KeyboardInterrupt as exc:
            raise _Enough from exc
        finally:
            if case.operation.path.endswith("/drain"):
                self._resume()
        self.findings.count(route, code)

    def _again(self, case: Any) -> str:
        kwargs = case.as_transport_kwargs(base_url=self._controller.address)
        sent = requests.Request(**{k: v for k, v in kwargs.items() if k in _PARTS}).prepare()
        body = sent.body.encode() if isinstance(sent.body, str) else sent.body
        headers = {name: str(sent.headers[name]) for name in _HEADERS if name in sent.headers}
        given = body if isinstance(body, bytes) else b""
        return self.findings.curl(sent.method or "", sent.url or "", given, headers)

    def _aim(self, case: Any) -> None:
        """Have half of the requests mean something, which random names would not: they reach the
        worker, and workers that are registered beside it are at addresses where nobody listens."""
        if self._sent % 2:
            return
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = self._model
            if isinstance(case.body.get("worker_name"), str):
                case.body["worker_name"] = f"http://127.0.0.1:{1 + self._sent % 8}"
                status = case.body.get("worker_status")
                if self._sent % 4 and isinstance(status, dict):
                    status["model_names"] = [self._model]
        if "worker_id" in (case.path_parameters or {}):
            case.path_parameters["worker_id"] = self._worker_id

    def _answered(self, case: Any) -> str:
        try:
            answer = case.call(
                base_url=self._controller.address, session=self._session, timeout=CASE_TIMEOUT_S
            )
        except requests.RequestException as exc:
            raise Fault(f"no complete answer: {type(exc).__name__} {exc}") from exc
        media_type = (answer.headers.get("content-type") or [""])[0].partition(";")[0]
        prompt = case.body.get("prompt") if isinstance(case.body, dict) else None
        return outcome(
            case.operation.path,
            answer.status_code,
            media_type,
            answer.content,
            prompt=prompt if isinstance(prompt, str) else "",
        )

    def _resume(self) -> None:
        with suppress(httpx.HTTPError):
            self._post(f"/workers/{self._worker_id}/resume")

    def _post(self, path: str, **fields: Any) -> httpx.Response:
        url = self._controller.address + path
        return httpx.post(url, json=fields or None, timeout=CASE_TIMEOUT_S, trust_env=False)

    def _good(self) -> None:
        """The worker serves, whatever else has been registered beside it."""
        self._resume()
        path = STREAMED[1]
        part = {"type": "image_url", "image_url": {"url": _uri(pictures.red_circle())}}
        turn = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}
        try:
            answer = self._post(path, model=self._model, messages=[turn], max_tokens=6)
            code = outcome(path, answer.status_code, "application/json", answer.content)
            if code != "ok":
                raise Fault(f"a good request is answered with {code}")
        except (Fault, httpx.HTTPError) as exc:
            self.findings.fault(path, "a good request", str(exc))

    def at_the_end(self) -> dict[str, Any]:
        """What is left behind; the worker must be back and serving."""
        self._good()
        deadline = time.monotonic() + 15
        addresses = (self._controller.address, [self._worker.address])
        while any((left := leftovers(*addresses)).values()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if any(left.values()):
            self.findings.fault("", "the end", f"left behind: {left}")
        workers = httpx.get(f"{self._controller.address}/cluster", timeout=10).json()["workers"]
        states = [w["state"] for w in workers if w["worker_id"] == self._worker_id]
        if states != ["ready"]:
            self.findings.fault("", "the end", f"the worker is registered as {states}")
        return {"left_behind": left, "registered": len(workers)}


def _uri(image: str) -> str:
    return f"data:image/png;base64,{image}"


def run(harness: Harness, keep: Keep, *, kind: str, cases: int, seed: int) -> None:
    """Send ``cases``, print, and keep the line of results.

    Raises:
        ProcessFailed: a process did not start, or does not answer at the end.
    """
    with (
        harness.process("controller") as controller,
        harness.worker(kind=kind, controller=controller.address) as worker,
    ):
        wait_ready(controller.address, 1)
        status = worker.status()
        one = _Run(controller, worker, status.model_names[0], status.worker_id)

        def work() -> None:
            one.other_methods()
            one.go(cases, seed)

        took = until_stopped(work)
        ended = one.at_the_end()
    findings = one.findings
    findings.show(harness.console, f"{findings.cases} requests from /openapi.json, {kind}")
    for label, why in one.left_out.items():
        harness.console.print(f"not made: {label}: {why}", style="yellow", markup=False)
    figures = {
        "worker": kind,
        "seed": seed,
        **took,
        "not_made": one.left_out,
        **ended,
        **findings.as_json(),
    }
    keep(record("fuzz_openapi", status, figures))
    if took["interrupted"]:
        raise KeyboardInterrupt
