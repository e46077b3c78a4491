"""What OpenAI's clients may ask, translated to our requests.

Formats: https://platform.openai.com/docs/api-reference/chat and .../completions. Unknown fields
are refused by name (law L7): a misspelt ``max_token`` must not be ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from protocol.errors import InvalidRequest
from protocol.messages import ChatMessage, ContentPart, ImagePart, TextPart

MAX_CHOICES = 32
"""Answers to one request; each takes a slot of its own."""

_ANY_OBJECT = '{"type":"object"}'


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# ---------------------------------------------------------------- parts


class Text(_Strict):
    type: Literal["text"]
    text: str


class Url(_Strict):
    url: str = Field(description="data:image/png;base64,..., or an address where they are fetched")
    detail: Literal["auto", "low", "high"] | None = None


class Image(_Strict):
    type: Literal["image_url"]
    image_url: Url


class Turn(_Strict):
    """One message; ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[Annotated[Text | Image, Field(discriminator="type")], ...]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool | None = None


class JsonSchema(_Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """``strict`` changes nothing: a schema always holds here."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def as_schema(self) -> str | None:
        """The JSON schema the answer has to follow, as text.

        Raises:
            InvalidRequest: the type is ``json_schema`` and there is none.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return _ANY_OBJECT
        if self.json_schema is None or self.json_schema.schema_ is None:
            field = "response_format.json_schema.schema"
            raise InvalidRequest(f"{field}: a json_schema format needs it.", param=field)
        return orjson.dumps(self.json_schema.schema_).decode()


# ---------------------------------------------------------------- requests

_SAME_NAME = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "min_p",
        "repetition_penalty",
        "regex",
        "adapter",
        "kind",
    }
)


class _Request(_Strict):
    """The fields that both of OpenAI's routes have, and our extras; null means not given."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = Field(
        default=None, ge=1, description="as many as this server allows when not given"
    )
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, description="taken and not used")
    # extras
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    regex: str | None = Field(default=None, description="the answer has to match it as a whole")
    adapter: str | None = None
    kind: str | None = Field(default=None, description="only replicas of this worker kind")

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _shared(self, default_tokens: int, limit: int | None) -> dict[str, Any]:
        """The fields of a ``GenerateRequest`` that do not depend on the prompt."""
        fields: dict[str, Any] = self.model_dump(include=set(_SAME_NAME), exclude_none=True)
        fields["max_new_tokens"] = default_tokens if limit is None else limit
        if self.response_format is not None:
            fields["json_schema"] = self.response_format.as_schema()
        return fields

    def _each_choice(self, fields: dict[str, Any]) -> list[dict[str, Any]]:
        """``fields`` for each choice: a seed gives each its own, or all would be the same."""
        if self.seed is None:
            return [fields] * self.choices
        return [fields | {"seed": self.seed + index} for index in range(self.choices)]


class ChatCompletionRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: tuple[Turn, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="the newer name of max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def echoes(self) -> list[str]:
        """What stands before each answer."""
        return [""] * self.choices

    def as_fields(self, default_tokens: int) -> list[dict[str, Any]]:
        """The fields of one ``GenerateRequest`` for each answer.

        ``images`` are as they came, addresses among them.

        Raises:
            InvalidRequest: fields contradict each other.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs: it needs logprobs to be true.", param="top_logprobs"
            )
        limit = self.max_completion_tokens or self.max_tokens
        fields = self._shared(default_tokens, limit)
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        images: list[str] = []
        fields["messages"] = [_message(turn, images) for turn in self.messages]
        return self._each_choice(fields | {"images": images})


def _message(turn: Turn, images: list[str]) -> ChatMessage:
    role: Any = "system" if turn.role == "developer" else turn.role
    if isinstance(turn.content, str):
        return ChatMessage(role=role, content=turn.content)
    parts: list[ContentPart] = []
    for part in turn.content:
        if isinstance(part, Text):
            parts.append(TextPart(text=part.text))
        else:
            images.append(part.image_url.url)
            parts.append(ImagePart())
    return ChatMessage(role=role, content=tuple(parts))


class CompletionRequest(_Request):
    """``POST /v1/completions``: the prompt is ready text, no chat template is applied."""

    prompt: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = Field(default=None, description="the answer begins with its prompt")
    images: tuple[str, ...] = Field(
        default=(), description="an extra: one for each <image> of the prompt"
    )

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def prompts(self) -> Sequence[str]:
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def echoes(self) -> list[str]:
        """What stands before each answer."""
        return [text if self.echo else "" for text in self.prompts for _ in range(self.choices)]

    def as_fields(self, default_tokens: int) -> list[dict[str, Any]]:
        """The fields of one ``GenerateRequest`` for each answer, prompt by prompt.

        Raises:
            InvalidRequest: too many answers, fields contradict each other, or the prompts would
                be echoed without the log probabilities that were asked for.
        """
        if len(self.prompts) * self.choices > MAX_CHOICES:
            raise InvalidRequest(
                f"n: {len(self.prompts)} prompts of {self.choices} answers each; "
                f"{MAX_CHOICES} answers are the most.",
                param="n",
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo: a prompt's own tokens have no logprobs here.",
                remedy="Leave out echo or logprobs.",
                param="echo",
            )
        fields = self._shared(default_tokens, self.max_tokens) | {"images": self.images}
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        return [
            choice
            for prompt in self.prompts
            for choice in self._each_choice(fields | {"prompt": prompt})
        ]
