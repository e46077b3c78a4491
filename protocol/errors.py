"""The error tree: each failure is a type with a code, an HTTP status and an opinion on retrying.

    TandemError
    ├─ RequestError                 the request is at fault; the same request fails everywhere
    │  ├─ InvalidRequest            422 invalid_request
    │  ├─ TooLarge                  413 too_large
    │  ├─ ContextOverflow           413 context_overflow
    │  ├─ BadImage                  422 bad_image
    │  ├─ ModelNotFound             404 model_not_found
    │  ├─ AdapterNotFound           404 adapter_not_found
    │  ├─ Unsupported               422 unsupported
    │  ├─ Unauthenticated           401 unauthenticated
    │  ├─ Forbidden                 403 forbidden
    │  ├─ NotFound                  404 not_found
    │  └─ MethodNotAllowed          405 method_not_allowed
    ├─ CapacityError                not now; the same request may succeed later
    │  ├─ Overloaded                429 overloaded
    │  ├─ RateLimited               429 rate_limited
    │  ├─ NoReplicaAvailable        503 no_replica
    │  └─ Draining                  503 draining            (retried elsewhere)
    └─ ServingError                 something broke on our side
       ├─ UpstreamLost              502 upstream_lost       (retried elsewhere)
       ├─ EngineFailed              500 engine_failed
       ├─ OutOfMemory               503 out_of_memory       (retried elsewhere)
       └─ DeadlineExceeded          504 deadline_exceeded

"Retried elsewhere" holds only before the first event of a stream has been sent (law L3).
LLaVA's numeric ``error_code`` is the HTTP status: never 0, and it says whose fault it is.
"""

from __future__ import annotations

from typing import Any, ClassVar


class TandemError(Exception):
    """Base of every failure that crosses a process boundary.

    ``message`` says in one sentence what happened; ``remedy`` what to do about it.
    """

    code: ClassVar[str] = "engine_failed"
    status: ClassVar[int] = 500
    retry_elsewhere: ClassVar[bool] = False
    family: ClassVar[str] = "serving_error"
    default_param: ClassVar[str | None] = None
    default_remedy: ClassVar[str] = "Look into the log of the process that answered."

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None = None,
        retry_after_s: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param or self.default_param  # OpenAI's word for the field at fault
        self.remedy = remedy if remedy is not None else self.default_remedy
        self.retry_after_s = retry_after_s

    @property
    def llava_error_code(self) -> int:
        """LLaVA's non-zero ``error_code``."""
        return self.status

    def body(self) -> dict[str, Any]:
        """The JSON of a refusal: ``error`` is OpenAI's object with our code, remedy and wait.

        ``text`` and ``error_code`` repeat it for LLaVA's clients, which read nothing else.
        """
        error: dict[str, Any] = {
            "code": self.code,
            "type": self.family,
            "message": self.message,
            "param": self.param,
            "remedy": self.remedy,
        }
        if self.retry_after_s is not None:
            error["retry_after_s"] = round(self.retry_after_s, 3)
        return {"error": error, "text": f"{self.message} {self.remedy}", "error_code": self.status}


class RequestError(TandemError):
    """The request itself cannot be served; repeating it does not help."""

    family = "request_error"


class InvalidRequest(RequestError):
    code = "invalid_request"
    status = 422
    default_remedy = "Correct the request; the sentence names the field."


class TooLarge(RequestError):
    code = "too_large"
    status = 413
    default_remedy = "Send less at once; the sentence names the limit."


class ContextOverflow(RequestError):
    code = "context_overflow"
    status = 413
    default_remedy = "Shorten the conversation or the prompt, or send fewer images."


class BadImage(RequestError):
    code = "bad_image"
    status = 422
    default_remedy = "Send a complete PNG, JPEG, WebP, GIF or BMP as base64 or a data URI."


class ModelNotFound(RequestError):
    code = "model_not_found"
    status = 404
    default_param = "model"
    default_remedy = "GET /v1/models lists the models that are served."


class AdapterNotFound(RequestError):
    code = "adapter_not_found"
    status = 404
    default_param = "adapter"
    default_remedy = "GET /cluster lists the adapters each worker has loaded."


class Unsupported(RequestError):
    code = "unsupported"
    status = 422
    default_remedy = "Leave the field out, or choose a worker kind that supports it."


class Unauthenticated(RequestError):
    code = "unauthenticated"
    status = 401
    default_remedy = "Send a key of this controller as Authorization: Bearer KEY."


class Forbidden(RequestError):
    code = "forbidden"
    status = 403
    default_remedy = "Ask whoever runs this controller to allow it."


class NotFound(RequestError):
    code = "not_found"
    status = 404
    default_remedy = "GET /openapi.json lists the routes."


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    status = 405
    default_remedy = "GET /openapi.json lists the routes and their methods."


class CapacityError(TandemError):
    """Not now: the request is fine and may succeed later or on another replica."""

    family = "capacity_error"


class Overloaded(CapacityError):
    code = "overloaded"
    status = 429
    default_remedy = "Try again after the time in Retry-After."


class RateLimited(CapacityError):
    code = "rate_limited"
    status = 429
    default_remedy = "Try again after the time in Retry-After, or ask for a higher rate."


class NoReplicaAvailable(CapacityError):
    code = "no_replica"
    status = 503
    default_remedy = "Start a worker for this model, or try again when it has loaded."


class Draining(CapacityError):
    code = "draining"
    status = 503
    retry_elsewhere = True
    default_remedy = "Try again: another replica, or this one after its restart, will take it."


class ServingError(TandemError):
    """Something on the serving side broke."""


class UpstreamLost(ServingError):
    code = "upstream_lost"
    status = 502
    retry_elsewhere = True
    default_remedy = "Send the request again; the worker's log says why it went away."


class EngineFailed(ServingError):
    code = "engine_failed"
    status = 500
    default_remedy = "Look into the worker's log; it names the cause."


class OutOfMemory(ServingError):
    code = "out_of_memory"
    status = 503
    retry_elsewhere = True
    default_remedy = "Send a shorter request, or give the worker more memory or fewer slots."


class DeadlineExceeded(ServingError):
    code = "deadline_exceeded"
    status = 504
    default_remedy = "Ask for fewer tokens, or raise the worker's time limits."


ERRORS: dict[str, type[TandemError]] = {
    cls.code: cls
    for base in (RequestError, CapacityError, ServingError)
    for cls in base.__subclasses__()
}
"""Every leaf of the tree by its code."""


def from_wire(
    code: str, message: str, remedy: str | None = None, retry_after_s: float | None = None
) -> TandemError:
    """Rebuild an error another process reported; an unknown code becomes ``EngineFailed``."""
    return ERRORS.get(code, EngineFailed)(message, remedy=remedy, retry_after_s=retry_after_s)
