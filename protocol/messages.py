"""Requests, worker status and leases: what is said on the wire, as frozen pydantic models.

Everything here is a superset of what LLaVA's and FastChat's processes send, so their requests
and registrations are valid ones. Messages ignore unknown fields (law L7) and carry
``protocol_version``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from protocol.errors import InvalidRequest

PROTOCOL_VERSION = 1

IMAGE_PLACEHOLDER = "<image>"
"""Where an image stands in a prompt or in the text of a message (LLaVA's convention)."""


ADAPTER_NAME = r"^[A-Za-z0-9._-]{1,64}$"
BASE = "base"
"""What no adapter may be called: the model without one."""


def split_model(name: str) -> tuple[str, str | None]:
    """``base:adapter`` as its two parts; a model's own name may contain colons as well."""
    base, colon, adapter = name.rpartition(":")
    return (base, adapter) if colon else (name, None)


def one_adapter(named: str, field: str | None) -> str:
    """The adapter of a request whose model name ends in ``:named``.

    Raises:
        InvalidRequest: its ``adapter`` field asks for another one.
    """
    if field not in (None, named):
        raise InvalidRequest(
            f"The model name asks for the adapter {named!r}, the field adapter for {field!r}."
        )
    return named


class Message(BaseModel):
    """Base of everything on the wire: frozen, and deaf to fields it does not know.

    Pydantic would keep short strings of requests in a cache of its own; ours are rarely repeated.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", cache_strings="keys")


# ---------------------------------------------------------------- requests


class TextPart(Message):
    type: Literal["text"] = "text"
    text: str


class ImagePart(Message):
    """Stands for the next element of ``GenerateRequest.images``."""

    type: Literal["image"] = "image"


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Message):
    """One turn. ``content`` is text (``<image>`` stands for an image) or a list of parts."""

    role: Literal["system", "user", "assistant"]
    content: str | tuple[ContentPart, ...]

    @property
    def parts(self) -> tuple[TextPart | ImagePart, ...]:
        """The content as parts, with every ``<image>`` in a text turned into an image part."""
        content = (TextPart(text=self.content),) if isinstance(self.content, str) else self.content
        parts: list[TextPart | ImagePart] = []
        for part in content:
            if isinstance(part, ImagePart):
                parts.append(part)
                continue
            for index, text in enumerate(part.text.split(IMAGE_PLACEHOLDER)):
                if index:
                    parts.append(ImagePart())
                if text.strip():
                    parts.append(TextPart(text=text))
        return tuple(parts)


class SamplingParams(Message):
    """How tokens are chosen and when the answer ends.

    ``temperature`` 0 is greedy; the defaults are LLaVA's. ``max_new_tokens`` counts
    ``resume_token_ids`` too. The penalties regard the tokens of the answer, resumed ones included,
    and not the prompt's: OpenAI's two are subtracted from a token's score, ``presence_penalty``
    once and ``frequency_penalty`` for each time it has come; then the repetition penalty divides
    (or, below 0, multiplies) it.
    """

    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, ge=0, le=1, description="0: the likeliest token only")
    top_k: int = Field(default=0, ge=0, lt=2**30, description="0: no limit")  # SGLang's int32
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.001, le=2)  # else float32 overflows
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    max_new_tokens: int = Field(default=256, ge=1, le=1_000_000)
    stop: tuple[str, ...] = Field(default=(), max_length=16)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    json_schema: str | None = None
    regex: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        """OpenAI's and FastChat's clients send null for what they leave to the server."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data

    @field_validator("top_k", mode="before")
    @classmethod
    def _no_limit(cls, value: object) -> object:
        """FastChat's word for it is -1."""
        return 0 if value == -1 else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        """LLaVA sends one string, OpenAI a list; an empty stop means none."""
        if isinstance(value, str):
            return (value,) if value else ()
        return value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not stop for stop in value):
            raise ValueError("a stop string must not be empty")
        return value

    @model_validator(mode="after")
    def _one_grammar(self) -> SamplingParams:
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex exclude each other")
        return self


class GenerateRequest(SamplingParams):
    """One generation, flat as LLaVA's: either ``prompt`` (ready text) or ``messages``.

    ``images`` are base64 or ``data:`` URIs, in the order of their placeholders. ``kind`` asks for
    replicas of one worker kind; ``adapter`` may also be a part of ``model``, as ``base:adapter``.
    ``resume_token_ids`` are tokens already generated elsewhere: the worker goes on after them as
    if it had made them itself (law L8). ``echo`` is FastChat's field; LLaVA has none and echoes.
    """

    model: str = Field(min_length=1, max_length=512)
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = Field(default=None, min_length=1)
    images: tuple[str, ...] = ()
    adapter: str | None = None
    kind: str | None = None
    request_id: str | None = Field(default=None, max_length=128, pattern=r"^[\x21-\x7e]+$")
    resume_token_ids: tuple[int, ...] = ()
    echo: bool = Field(default=True, description="NUL-delimited frames begin with the prompt")

    @model_validator(mode="after")
    def _consistent(self) -> GenerateRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send exactly one of prompt and messages")
        if self.messages is not None and self.messages[-1].role == "assistant":
            raise ValueError("the last message must not be the assistant's: it is to answer")
        if self.placeholders != len(self.images):
            raise ValueError(
                f"{self.placeholders} {IMAGE_PLACEHOLDER} placeholders but {len(self.images)} "
                "images; each image needs its place in the text"
            )
        return self

    @property
    def placeholders(self) -> int:
        """How many images the text asks for."""
        if self.prompt is not None:
            return self.prompt.count(IMAGE_PLACEHOLDER)
        return sum(
            isinstance(part, ImagePart) for turn in self.messages or () for part in turn.parts
        )

    @property
    def prompt_chars(self) -> int:
        """Length of the text, for estimates of work."""
        if self.prompt is not None:
            return len(self.prompt)
        return sum(
            len(part.text)
            for turn in self.messages or ()
            for part in turn.parts
            if isinstance(part, TextPart)
        )

    @property
    def needs(self) -> frozenset[str]:
        """The capabilities (fields of ``Capabilities``) a replica must have to serve this."""
        wanted = {
            "chat": self.messages is not None,
            "images": bool(self.images),
            "adapters": self.adapter is not None,
            "grammar": self.json_schema is not None or self.regex is not None,
            "logprobs": self.logprobs is not None,
            "seed": self.seed is not None,
            "resume": bool(self.resume_token_ids),
            "sampling": self.top_k > 0 or self.repetition_penalty != 1.0,
            "min_p": self.min_p > 0,
            "penalties": self.presence_penalty != 0 or self.frequency_penalty != 0,
        }
        return frozenset(name for name, needed in wanted.items() if needed)


# ---------------------------------------------------------------- worker status


class WorkerState(StrEnum):
    STARTING = "starting"  # the model is loading
    READY = "ready"
    DRAINING = "draining"  # finishes what runs, accepts nothing


class Capabilities(Message):
    """What a replica can do beyond a ready prompt in, text out.

    The last three are what the workers of others lack.
    """

    chat: bool = False  # knows its chat template, so takes messages
    images: bool = False
    adapters: bool = False
    grammar: bool = False
    logprobs: bool = False
    seed: bool = False
    resume: bool = False
    sampling: bool = True  # beyond temperature and top_p
    min_p: bool = True
    penalties: bool = True  # presence and frequency

    def missing(self, needs: frozenset[str]) -> list[str]:
        """Those of ``needs`` this replica lacks, sorted."""
        return sorted(name for name in needs if not getattr(self, name, False))


LLAVA = Capabilities(images=True, sampling=False, min_p=False, penalties=False)
"""What LLaVA's worker can do, which does not say so."""
FASTCHAT = Capabilities(min_p=False, penalties=False)
"""What FastChat's can, which sees pictures if it registers as ``multimodal``."""


class CacheStatus(Message):
    """The prefix cache, in tokens; ``hit_rate`` is the cached share of all prompt tokens."""

    used_tokens: int = 0
    size_tokens: int = 0
    hit_rate: float = 0.0


class WorkerStatus(Message):
    """A worker about itself. The first three fields are LLaVA's whole status.

    The defaults describe a worker that says no more than those three: LLaVA's or FastChat's.
    """

    model_names: tuple[str, ...] = Field(min_length=1)
    speed: float = Field(default=1.0, ge=0, description="decode tokens per second, measured")
    queue_length: int = Field(default=0, ge=0, description="running + waiting")

    worker_id: str = ""
    epoch: int = Field(default=0, description="start time in ns: a restart is another replica")
    kind: str = "llava"
    state: WorkerState = WorkerState.READY
    capacity: int | None = Field(
        default=None, ge=1, description="requests decoded at once; none: it queues by itself"
    )
    running: int = Field(default=0, ge=0)
    waiting: int = Field(default=0, ge=0)
    context_length: int | None = None
    image_tokens: int = Field(default=576, ge=0, description="tokens per image, for estimates")
    capabilities: Capabilities = LLAVA
    precision: str | None = None
    weight_bytes: int | None = Field(default=None, description="that the weights take")
    unquantized_bytes: int | None = Field(
        default=None, description="that they would take had the worker not quantized them"
    )
    device: str | None = None
    adapters: tuple[str, ...] = ()
    cache: CacheStatus | None = None
    versions: dict[str, str] = {}
    progress: str | None = Field(default=None, description="while starting: what it does")
    protocol_version: int = 0

    @property
    def bases(self) -> tuple[str, ...]:
        """``model_names`` without those that are another's with an adapter."""
        return tuple(name for name in self.model_names if not self._adapted(name))

    def _adapted(self, name: str) -> bool:
        base, adapter = split_model(name)
        return adapter in self.adapters and base in self.model_names


# ---------------------------------------------------------------- adapters


class AdapterSource(Message):
    """``POST /adapters`` of a worker: where a LoRA adapter is, and what requests call it."""

    name: str = Field(pattern=ADAPTER_NAME)
    path: str = Field(min_length=1, max_length=4096, description="directory or hub id")

    @field_validator("name")
    @classmethod
    def _not_the_base(cls, value: str) -> str:
        if value == BASE:
            raise ValueError(f"{BASE} is the model without an adapter")
        return value


# ---------------------------------------------------------------- membership


class Registration(Message):
    """``POST /register_worker``. ``worker_name`` is the worker's address, as in LLaVA."""

    worker_name: str
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None
    multimodal: bool | None = Field(
        default=None, description="whether FastChat's worker sees pictures; no one else says so"
    )
    protocol_version: int = 0


class Heartbeat(Message):
    """``POST /receive_heart_beat``. Ours carries the whole status and so also registers."""

    worker_name: str
    queue_length: int = Field(default=0, ge=0)
    worker_status: WorkerStatus | None = None
    protocol_version: int = 0


class Lease(Message):
    """The controller's answer to both: permission to be routed to, for ``ttl_s`` seconds.

    ``exist`` is LLaVA's word for "I know you"; false means: register (again). The defaults are
    those of LLaVA's controller, which says no more than that.
    """

    exist: bool
    ttl_s: float = 30.0
    heartbeat_s: float = 15.0
    protocol_version: int = 0
