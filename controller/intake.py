"""What a request has to pass before it is admitted: its model may be used, limits are held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controller.callers import Caller
from protocol.errors import InvalidRequest, TooLarge
from protocol.messages import GenerateRequest, split_model


@dataclass(frozen=True, slots=True)
class Intake:
    """The limits of one request, and the further names of the models."""

    max_images: int
    max_tokens: int
    aliases: Mapping[str, str]

    def accept(self, request: GenerateRequest, caller: Caller) -> GenerateRequest:
        """``request``, the very object where it names its model as the workers do.

        Raises:
            Forbidden: ``caller`` may not use this model.
            TooLarge: too many images.
            InvalidRequest: more tokens than one answer may have.
        """
        if len(request.images) > self.max_images:
            raise TooLarge(
                f"{len(request.images)} images in one request; {self.max_images} are the most.",
                remedy="Send fewer images, or raise the controller's --max-images.",
                param="images",
            )
        if request.max_new_tokens > self.max_tokens:
            raise InvalidRequest(
                f"max_tokens: {request.max_new_tokens} were asked for; one answer may have "
                f"{self.max_tokens}.",
                remedy="Ask for fewer tokens, or raise the controller's --max-tokens.",
                param="max_tokens",
            )
        caller.check_model(request.model, request.adapter)
        model = self.resolve(request.model)
        return request if model == request.model else request.model_copy(update={"model": model})

    def resolve(self, model: str) -> str:
        """The workers' name for ``model``: an alias is replaced, with an adapter behind it, too."""
        if model in self.aliases:
            return self.aliases[model]
        base, adapter = split_model(model)
        return f"{self.aliases[base]}:{adapter}" if base in self.aliases else model

    def names(self, served: Iterable[str]) -> list[str]:
        """The names clients may use when the models ``served`` are: those, and their aliases."""
        known = list(served)
        return known + [alias for alias, model in self.aliases.items() if model in known]
