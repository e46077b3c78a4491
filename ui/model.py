"""What a conversation is made of: turns, each with a question and the answers it got."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from protocol.errors import TandemError

Status = Literal["running", "stop", "length", "stopped", "failed"]
Vote = Literal["up", "down"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Settings(Frozen):
    """How answers are asked for."""

    model: str = ""
    kind: str | None = None  # of the worker; None: the controller chooses
    adapter: str | None = None
    temperature: float = Field(default=0.2, ge=0, le=2)
    top_p: float = Field(default=0.95, ge=0, le=1)
    max_tokens: int = Field(default=1024, ge=1, le=32768)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    system: str = ""


class Figures(Frozen):
    """What an answer cost."""

    ttft_s: float | None = None
    duration_s: float | None = None
    tokens_per_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class Failure(Frozen):
    """Why an answer is missing or incomplete: a typed error, or ``away`` (no controller)."""

    code: str
    message: str
    remedy: str = ""
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: TandemError) -> Failure:
        return cls(
            code=error.code,
            message=error.message,
            remedy=error.remedy,
            retry_after_s=error.retry_after_s,
        )


@dataclass(slots=True)
class Answer:
    """One answer to a question; a question that was asked again has several."""

    id: int
    settings: Settings
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    status: Status = "running"
    kind: str | None = None
    worker_id: str | None = None
    request_id: str = ""
    figures: Figures = field(default_factory=Figures)
    failure: Failure | None = None
    vote: Vote | None = None
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """An image as the transcript needs it: its content is fetched by hash."""

    sha256: str
    name: str
    width: int
    height: int


@dataclass(slots=True)
class Turn:
    id: int
    text: str
    images: list[Image]
    answers: list[Answer] = field(default_factory=list)
    current: int = 0

    @property
    def answer(self) -> Answer | None:
        """The one that is shown, and that later questions follow."""
        return self.answers[self.current] if self.answers else None


@dataclass(slots=True)
class Conversation:
    id: str
    title: str
    turns: list[Turn] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of the list of conversations."""

    id: str
    title: str
    updated_at: float
