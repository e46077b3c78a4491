"""What is measured: a controller, a worker, SGLang's own server, any server with OpenAI's API.

A target is written NAME=URL, and the URL may say more: ``?api=openai`` how it is asked (found out
when not said), ``?kind=hf`` which workers of a controller, ``#MODEL`` which model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import httpx

from bench import wire
from bench.wire import Api, Ask, Template
from protocol.messages import WorkerState

_PROBE_S = 30.0


class TargetError(Exception):
    """A target cannot be asked; the text is a sentence for whoever named it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that is asked, and all that is known of it.

    ``flushed`` are the addresses whose prefix cache is emptied between runs, ``served_by`` all
    addresses whose processes work for it. ``facts`` go into the file of results.
    """

    name: str
    address: str
    api: Api
    model: str
    kind: str | None = None
    key: str | None = None
    template: Template | None = None
    flushed: tuple[str, ...] = ()
    served_by: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.address + wire.PATHS[self.api]

    @property
    def headers(self) -> dict[str, str]:
        return dict(wire.HEADERS[self.api]) | _authorization(self.key)

    def body(self, ask: Ask) -> bytes:
        """The request that asks ``ask``."""
        if self.api == "sglang":
            assert self.template is not None
            return wire.sglang_body(ask, self.template)
        extra = {} if self.kind is None else {"kind": self.kind}
        spell = wire.tandem_body if self.api == "tandem" else wire.openai_body
        return spell(ask, self.model, extra)


def _authorization(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


# ---------------------------------------------------------------- from what a user writes


@dataclass(frozen=True, slots=True)
class Written:
    """``NAME=URL?api=...&kind=...#MODEL``, taken apart."""

    name: str
    address: str
    api: Api | None = None
    kind: str | None = None
    model: str | None = None


def parse(text: str) -> Written:
    """A target as it is written on the command line.

    Raises:
        TargetError: it is not NAME=URL, or says what is not known.
    """
    name, found, url = text.partition("=")
    parts = urlsplit(url)
    if not found or not name or parts.scheme not in ("http", "https") or not parts.netloc:
        raise TargetError(f"{text!r} is no target; write NAME=http://HOST:PORT.")
    said = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    if unknown := sorted(said.keys() - {"api", "kind"}):
        raise TargetError(f"{text!r}: {unknown[0]!r} is not known; there are api and kind.")
    apis = get_args(Api)
    if (api := said.get("api")) is not None and api not in apis:
        raise TargetError(f"{text!r}: there is no api {api!r}; there are {', '.join(apis)}.")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Written(
        name=name,
        address=f"{parts.scheme}://{parts.netloc}{path}",
        api=next((known for known in apis if known == api), None),
        kind=said.get("kind"),
        model=parts.fragment or None,
    )


def find(written: Written, key: str | None = None) -> Target:
    """The target behind what was written; asks it what it is.

    Raises:
        TargetError: it does not answer, or not as anything we know.
    """
    with httpx.Client(timeout=_PROBE_S, trust_env=False, headers=_authorization(key)) as client:
        for api, look in (("tandem", _tandem), ("sglang", _sglang), ("openai", _openai)):
            if written.api not in (None, api):
                continue
            try:
                found = look(client, written)
            except httpx.ConnectError as exc:
                raise TargetError(f"{written.name}: nothing listens at {written.address}.") from exc
            except httpx.HTTPError as exc:
                raise TargetError(f"{written.name}: {written.address}: {exc}") from exc
            if found is not None:
                return Target(**found, key=key)
    how = f"?api={written.api} does" if written.api else "any server we know does"
    raise TargetError(f"{written.name}: {written.address} does not answer as {how}.")


def _json(client: httpx.Client, method: str, url: str) -> Any:
    """What a route says; ``None`` where there is none."""
    answer = client.request(method, url)
    if answer.status_code in (401, 403):
        raise TargetError(f"{url} says {answer.status_code}; give --api-key.")
    try:
        return answer.json() if answer.status_code == 200 else None
    except ValueError:
        return None


def _tandem(client: httpx.Client, written: Written) -> dict[str, Any] | None:
    cluster = _json(client, "GET", f"{written.address}/cluster")
    if isinstance(cluster, dict) and "workers" in cluster:
        return _controller(written, cluster["workers"])
    status = _json(client, "POST", f"{written.address}/worker_get_status")
    # LLaVA's workers say their names as well, but have no typed events.
    if not isinstance(status, dict) or "epoch" not in status:
        return None
    return {
        "name": written.name,
        "address": written.address,
        "api": "tandem",
        "model": _one_model(written, status["model_names"]),
        "flushed": (written.address,),
        "served_by": (written.address,),
        "facts": {"what": f"{status['kind']} worker", "workers": [_worker_facts(status)]},
    }


def _controller(written: Written, workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ready = [
        worker
        for worker in workers
        if worker["state"] == WorkerState.READY and written.kind in (None, worker["kind"])
    ]
    names = dict.fromkeys(name for worker in ready for name in worker["model_names"])
    if not names:
        kinds = f" of kind {written.kind}" if written.kind else ""
        raise TargetError(f"{written.name}: {written.address} has no ready worker{kinds}.")
    model = _one_model(written, list(names))
    serving = [w for w in ready if model in w["model_names"]]
    addresses = tuple(worker["address"] for worker in serving)
    return {
        "name": written.name,
        "address": written.address,
        "api": "tandem",
        "model": model,
        "kind": written.kind,
        "flushed": addresses,
        "served_by": (written.address, *addresses),
        "facts": {"what": "controller", "workers": [_worker_facts(worker) for worker in serving]},
    }


def _one_model(written: Written, names: Sequence[str]) -> str:
    """The model that was named, or the only one.

    Raises:
        TargetError: there are several, or the named one is not there.
    """
    if written.model is not None and written.model in names:
        return written.model
    if written.model is None and len(names) == 1:
        return names[0]
    listed = ", ".join(names)
    if written.model is None:
        raise TargetError(f"{written.name}: it serves {listed}; add #MODEL to its URL.")
    raise TargetError(f"{written.name}: it does not serve {written.model}, but {listed}.")


def _worker_facts(status: Mapping[str, Any]) -> dict[str, Any]:
    names = ("kind", "precision", "device", "capacity", "context_length", "versions", "cache")
    return {name: status.get(name) for name in names}


def _sglang(client: httpx.Client, written: Written) -> dict[str, Any] | None:
    info = _said(client, written.address, "model_info")
    if "model_path" not in info:
        return None
    path = Path(info["model_path"])
    if not path.is_dir():  # without its checkpoint we have no chat template: its OpenAI route has
        if written.api == "sglang":
            raise TargetError(f"{written.name}: no checkpoint at {path}; use ?api=openai.")
        return None
    server = _said(client, written.address, "server_info")
    return {
        "name": written.name,
        "address": written.address,
        "api": "sglang",
        "model": written.model or path.name,
        "template": _template(str(path)),
        "flushed": (written.address,),
        "served_by": (written.address,),
        "facts": {
            "what": "SGLang server",
            "model_path": str(path),
            "versions": {"sglang": server.get("version")},
        },
    }


def _said(client: httpx.Client, address: str, route: str) -> dict[str, Any]:
    """What a route of SGLang says, by its name of today or of yesterday."""
    for name in (route, f"get_{route}"):
        if isinstance(found := _json(client, "GET", f"{address}/{name}"), dict):
            return found
    return {}


@cache
def _template(checkpoint: str) -> Template:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)

    def rendered(ask: Ask) -> str:
        turns = [{"role": role, "content": _parts(text)} for role, text in ask.messages]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    return rendered


def _parts(text: str) -> list[dict[str, str]]:
    before, mark, after = text.rpartition("<image>")
    images = [{"type": "image"}] * (before.count("<image>") + bool(mark))
    return [*images, {"type": "text", "text": (before + after).replace("<image>", "")}]


def _openai(client: httpx.Client, written: Written) -> dict[str, Any] | None:
    models = _json(client, "GET", f"{written.address}/v1/models")
    if not isinstance(models, dict) or "data" not in models:
        return None
    if (ours := _tandem(client, written)) is not None and "kind" in ours:
        return ours | {"api": "openai"}  # a controller of ours, which knows what serves it
    return {
        "name": written.name,
        "address": written.address,
        "api": "openai",
        "model": _one_model(written, [model["id"] for model in models["data"]]),
        "served_by": (written.address,),
        "facts": {"what": "server with OpenAI's API"},
    }


# ---------------------------------------------------------------- while it is measured


def death(target: Target) -> str:
    """Why the target is dead, in a sentence; nothing if it lives."""
    try:
        with httpx.Client(
            timeout=_PROBE_S, trust_env=False, headers=_authorization(target.key)
        ) as client:
            if target.facts.get("what") == "controller":
                workers = client.get(f"{target.address}/cluster").json()["workers"]
                there = {worker["address"] for worker in workers if worker["state"] == "ready"}
                return "" if there & set(target.flushed) else "none of its workers is left"
            client.get(f"{target.address}/health")
    except httpx.HTTPError as exc:
        return f"it does not answer: {str(exc) or type(exc).__name__}"
    return ""


def flush(target: Target) -> tuple[str, ...]:
    """Empty the prefix caches behind ``target``; the addresses where that could not be done."""
    without = []
    with httpx.Client(
        timeout=_PROBE_S, trust_env=False, headers=_authorization(target.key)
    ) as client:
        for address in target.flushed:
            try:
                status = client.post(f"{address}/flush_cache").status_code
            except httpx.HTTPError:
                status = 0
            if status != 200:
                without.append(address)
    return tuple(without)
