"""Errors over HTTP. In: what went wrong; out: an answer in OpenAI's form, without path and traceback."""

import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response

from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, UsageError
from regpt2.sampling.batching.engine import EngineClosed, QueueFull

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
RETRY_AFTER_S = 1  # a slot is free after some hundred tokens at the latest


@dataclass
class ApiError(Exception):
    """What a client is answered instead of what it asked for."""

    status: int
    message: str
    param: str | None = None
    """The field that is wrong."""
    code: str | None = None
    kind: str = "invalid_request_error"
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, object]:
        """As OpenAI has it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class JSON(Response):
    """JSON as UTF-8; half surrogate pairs, which no UTF-8 can hold, stay escapes."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return to_json(content)


def to_json(content: object) -> bytes:
    """One line of JSON in UTF-8."""
    return _ENCODER.encode(content).encode("utf-8", "backslashreplace")


def error_answer(error: ApiError) -> Response:
    """The error as a whole answer."""
    return JSON(error.body(), error.status, headers=dict(error.headers))


def as_api_error(error: Exception) -> ApiError:
    """What a client may know of an error; what it may not goes to standard error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        message = f"{error} Ask again after a moment."
        return ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error", headers=headers)
    if isinstance(error, EngineClosed):
        return ApiError(503, "The server is stopping.", code="service_unavailable", kind="server_error")
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, CheckpointError):
        warn(f"a request failed: {error}")
        what = "The model's weights hold NaN or infinity."
    else:  # a mistake of ours, or no memory
        warn("a request failed:\n" + "".join(traceback.format_exception(error)))
        what = "The model failed."
    return ApiError(500, f"{what} The server's log has the details.", code="internal_error", kind="server_error")
