"""A cluster file to a frozen plan: which processes, in which order, with which flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cluster.config import ClusterFile, ConfigError, UiSection, WorkerSection, parse

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: children run from here."""

DEMO_MODEL = "models/pocket-llava"
HUGGING_FACE_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

Locate = Callable[[str], str]
"""A ``model-path`` as written to the path or Hugging Face id the worker gets."""


class Role(StrEnum):
    CONTROLLER = "controller"
    PAGE = "page"  # for people: the chat
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process to start, all but its port and the controller's address."""

    name: str
    role: Role
    kind: str
    module: str
    host: str
    port: int | None  # None: a free one, picked when it starts
    flags: tuple[str, ...] = ()
    args: tuple[str, ...] = ()  # as written; last, because what follows "--" is the engine's
    env: Mapping[str, str] = field(default_factory=dict)
    model: str = ""  # shown until the worker says itself
    device: str = ""  # likewise

    def address(self, port: int) -> str:
        """Where the other processes of this machine reach it."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = everywhere.get(self.host, self.host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def argv(self, port: int, controller_address: str, *, log_json: bool = False) -> list[str]:
        """The arguments after the Python interpreter."""
        argv = ["-m", self.module, *self.flags, "--host", self.host, "--port", str(port)]
        if self.role is Role.WORKER:
            argv += ["--worker-id", self.name, "--controller-address", controller_address]
            if "--worker-address" not in self.args:
                argv += ["--worker-address", self.address(port)]
        elif self.role is Role.PAGE:
            argv += ["--controller-address", controller_address]
        if log_json:
            argv.append("--log-json")
        return [*argv, *self.args]


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster: the controller starts first, then the page and the workers together."""

    source: str
    controller: ProcessPlan
    workers: tuple[ProcessPlan, ...]
    page: ProcessPlan | None = None

    @property
    def processes(self) -> tuple[ProcessPlan, ...]:
        page = () if self.page is None else (self.page,)
        return (self.controller, *page, *self.workers)


def build(cluster: ClusterFile, source: str, locate: Locate) -> Plan:
    """The plan of a validated file.

    Raises:
        ConfigError: two workers share a name or a port, a worker has no model, ``locate`` refuses
            a model-path, or the controller is to speak https.
    """
    if any(arg.split("=")[0] == "--ssl-certfile" for arg in cluster.controller.args):
        raise ConfigError(
            f"{source}: controller: a cluster's processes reach each other by http; put a proxy "
            "that speaks https before it, or start the controller and the workers by themselves."
        )
    controller = ProcessPlan(
        name="controller",
        role=Role.CONTROLLER,
        kind="controller",
        module="controller",
        host=cluster.controller.host,
        port=cluster.controller.port,
        args=cluster.controller.args,
        env=cluster.controller.env,
    )
    workers: list[ProcessPlan] = []
    for index, section in enumerate(cluster.workers):
        where = f"{source}: workers[{index}]"
        workers += _workers(section, where, locate, seen=[worker.kind for worker in workers])
    plan = Plan(
        source=source, controller=controller, workers=tuple(workers), page=_page(cluster.ui)
    )
    _refuse_twins(plan)
    return plan


def load(path: Path) -> Plan:
    """Read and plan a cluster file.

    Raises:
        ConfigError: it cannot be read or used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no file {path}; `python -m cluster example > {path}` writes one."
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {_reason(exc)}.") from exc
    return build(parse(text, str(path)), str(path), locate_beside(path))


def demo(*, gpu: bool) -> Plan:
    """Controller, chat page, one SGLang and one HF worker on the embedded model.

    Raises:
        ConfigError: the embedded model is missing from the checkout.
    """
    worker: dict[str, object] = {"model-path": DEMO_MODEL}
    sglang: dict[str, object] = {}
    if gpu:
        worker["device"] = "cuda"
        # SGLang takes nearly all of a GPU unless told otherwise, and these two share one.
        sglang["args"] = ["--", "--mem-fraction-static", "0.5"]
    workers = [worker | sglang | {"kind": "sglang"}, worker | {"kind": "hf"}]
    cluster = ClusterFile.model_validate({"ui": {}, "workers": workers})
    return build(cluster, "the demo", locate_beside(ROOT / "demo"))


def locate_beside(path: Path) -> Locate:
    """Look a model-path up beside the cluster file, then in the checkout, else on the hub."""

    def locate(written: str) -> str:
        given = Path(written).expanduser()
        bases = (path.resolve().parent, ROOT)
        for base in bases:
            if (base / given).exists():
                return str((base / given).resolve())
        # "models/typo" looks like a hub id too, but a folder `models` here says what was meant.
        local = any((base / given.parts[0]).is_dir() for base in bases)
        if HUGGING_FACE_ID.fullmatch(written) and not local:
            return written
        raise ConfigError(f"there is no model at {written}")

    return locate


def _page(section: UiSection | None) -> ProcessPlan | None:
    if section is None:
        return None
    return ProcessPlan(
        name="ui",
        role=Role.PAGE,
        kind="page",
        module="ui",
        host=section.host,
        port=section.port,
        args=section.args,
        env=section.env,
    )


def _workers(
    section: WorkerSection, where: str, locate: Locate, seen: list[str]
) -> list[ProcessPlan]:
    flags: list[str] = []
    model = section.model_name or "echo"
    if section.kind == "echo":
        if section.model_path is not None:
            raise ConfigError(f"{where}: an echo worker has no model-path.")
    elif section.model_path is None:
        raise ConfigError(f"{where}: model-path is missing.")
    else:
        try:
            path = locate(section.model_path)
        except ConfigError as exc:
            raise ConfigError(f"{where}.model-path: {exc}.") from exc
        flags += ["--model-path", path]
        model = section.model_name or Path(path).name
    if section.model_name is not None:
        flags += ["--model-name", section.model_name]
    device, gpus = _device(section, where)
    if device is not None:
        flags += ["--device", device]
    if section.count > 1 and section.port is not None:
        raise ConfigError(f"{where}: {section.count} workers cannot share one port; write auto.")
    return [
        ProcessPlan(
            name=_name(section, number, seen.count(section.kind)),
            role=Role.WORKER,
            kind=section.kind,
            module=f"workers.{section.kind}",
            host=section.host,
            port=section.port,
            flags=tuple(flags),
            args=section.args,
            env={**section.env, **({"CUDA_VISIBLE_DEVICES": gpus} if gpus is not None else {})},
            model=model,
            device=device or (f"gpu {gpus}" if gpus is not None else ""),
        )
        for number in range(1, section.count + 1)
    ]


def _name(section: WorkerSection, number: int, seen: int) -> str:
    if section.name is None:
        return f"{section.kind}-{seen + number}"
    return section.name if section.count == 1 else f"{section.name}-{number}"


def _device(section: WorkerSection, where: str) -> tuple[str | None, str | None]:
    """``--device`` and the visible GPUs: a ``device`` of bare numbers means those GPUs."""
    if section.device is None or not section.device[0].isdigit():
        return section.device, section.gpus
    if section.gpus is not None:
        raise ConfigError(f"{where}: device and gpus both choose GPUs; write device: cuda.")
    return "cuda", section.device


def _refuse_twins(plan: Plan) -> None:
    names: set[str] = set()
    ports: dict[int, str] = {}
    for process in plan.processes:
        if process.name in names:
            raise ConfigError(f"{plan.source}: two processes are named {process.name}.")
        names.add(process.name)
        if process.port is None:
            continue
        if process.port in ports:
            raise ConfigError(
                f"{plan.source}: {ports[process.port]} and {process.name} "
                f"both want port {process.port}."
            )
        ports[process.port] = process.name


def _reason(exc: OSError | UnicodeDecodeError) -> str:
    return (exc.strerror or str(exc)) if isinstance(exc, OSError) else "it is not UTF-8 text"
