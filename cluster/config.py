"""The cluster file: its keys, and one sentence for each mistake.

``EXAMPLE`` is the manual of the format; ``python -m cluster example`` prints it.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from cluster.yaml_lines import Location, YamlProblem, read

EXAMPLE = """\
# A Tandem cluster on this machine: python -m cluster up cluster.yaml
# Every key but `kind` and `model-path` may be left out; an unknown key is refused.

controller:
  host: 127.0.0.1          # 0.0.0.0 lets other machines in; export TANDEM_CLUSTER_TOKEN first
  port: 21001              # or auto: a free one
  args: [--dispatch-method, shortest_queue]

ui:                        # the chat page; leave the section out for none
  port: 7860               # or auto

workers:                   # as many as you like, started together
  - kind: sglang           # sglang batches; hf takes quantized and LoRA models
    model-path: models/pocket-llava    # beside this file, in the checkout, or a Hugging Face id
    name: fast             # in the table and the log's name; default: kind-1, kind-2, ...
    port: auto             # or a fixed one

  - kind: hf
    model-path: models/pocket-llava
    count: 1               # that many of the same worker
    device: cpu            # cpu or cuda; left out, the worker takes the best it finds
    args: [--limit-model-concurrency, "5"]
    env: {OMP_NUM_THREADS: "2"}

#  - kind: hf
#    model-path: llava-hf/llava-1.5-7b-hf
#    gpus: "0"             # the GPUs this worker sees (CUDA_VISIBLE_DEVICES): "0" or "0,1"
#    args: [--load-4bit]
#  - kind: sglang
#    model-path: llava-hf/llava-1.5-13b-hf
#    gpus: "1,2"
#    args: ["--", --tp-size, "2"]    # what follows "--" goes to SGLang itself
"""

KINDS = ("sglang", "hf", "echo")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
OWN_FLAGS = {
    "--host": "host",
    "--port": "port",
    "--model-path": "model-path",
    "--model-name": "model-name",
    "--device": "device",
    "--controller-address": "controller",
}
"""Flags the cluster sets itself, and the key that sets each."""


class ConfigError(Exception):
    """The cluster cannot be started as written; the message is one sentence for a person."""


def _port(value: object) -> object:
    if value == "auto" and isinstance(value, str):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
        return value
    raise ValueError("should be auto or a number from 1 to 65535")


Port = Annotated[int | None, BeforeValidator(_port)]
"""``None`` stands for auto: the supervisor picks a free one."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        coerce_numbers_to_str=True,  # `args: [--limit, 5]` and `gpus: 0` say what they mean
        protected_namespaces=(),
    )

    host: str = Field(default="127.0.0.1", min_length=1)
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}

    @field_validator("args")
    @classmethod
    def _leaves_our_flags_to_us(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        ours = args[: args.index("--")] if "--" in args else args
        for flag in ours:
            key = OWN_FLAGS.get(flag.split("=")[0])
            if key is not None:
                raise ValueError(f"should not hold {flag}: write the key {key} instead")
        return args


class ControllerSection(Section):
    port: Port = 21001


class UiSection(Section):
    port: Port = 7860


class WorkerSection(Section):
    kind: Literal["sglang", "hf", "echo"]
    name: str | None = Field(default=None, pattern=NAME)
    model_path: str | None = Field(default=None, min_length=1)
    model_name: str | None = Field(default=None, min_length=1)
    port: Port = None
    device: str | None = Field(default=None, pattern=r"^[\w:-]+(,\d+)*$")
    gpus: str | None = Field(default=None, pattern=r"^[\w/-]+(,[\w/-]+)*$")
    count: int = Field(default=1, ge=1, le=64, strict=True)


class ClusterFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    controller: ControllerSection = ControllerSection()
    ui: UiSection | None = None
    workers: tuple[WorkerSection, ...]


def parse(text: str, source: str) -> ClusterFile:
    """The validated file.

    Raises:
        ConfigError: it names ``source``, the line, the key and what should be there.
    """
    try:
        document = read(text)
    except YamlProblem as exc:
        raise ConfigError(f"{_place(source, exc.line)}: not valid YAML: {exc}.") from exc
    if document.value is None:
        raise ConfigError(f"{source} is empty; `python -m cluster example` prints a cluster file.")
    try:
        return ClusterFile.model_validate(document.value)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        line = document.line_of(error["loc"])
        raise ConfigError(f"{_place(source, line)}: {_sentence(error)}.") from exc


def _place(source: str, line: int | None) -> str:
    return source if line is None else f"{source}, line {line}"


def _sentence(error: ErrorDetails) -> str:
    location: Location = error["loc"]
    key = _dotted(location) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key{_suggestion(location)}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"{key} should be a mapping of keys and values, not {_shown(error['input'])}"
    if error["type"] == "tuple_type":
        return f"{key} should be a list, not {_shown(error['input'])}"
    if error["type"] == "string_pattern_mismatch":
        return f"{key} cannot be {_shown(error['input'])}"
    if error["type"] == "literal_error":
        return f"{key} should be one of {', '.join(KINDS)}, not {_shown(error['input'])}"
    if error["type"] == "value_error":
        return f"{key} {error['msg'].removeprefix('Value error, ')}"
    message = error["msg"].removeprefix("Input ")
    return f"{key} {message[:1].lower()}{message[1:]}, not {_shown(error['input'])}"


def _dotted(location: Location) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


def _suggestion(location: Location) -> str:
    section: type[BaseModel] = ClusterFile
    if location[0] == "controller" and len(location) > 1:
        section = ControllerSection
    elif location[0] == "ui" and len(location) > 1:
        section = UiSection
    elif location[0] == "workers" and len(location) > 1:
        section = WorkerSection
    keys = [field.alias or name for name, field in section.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), keys, n=1)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(keys)})"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:40])
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)
