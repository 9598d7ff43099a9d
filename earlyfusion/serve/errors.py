"""Errors as a client sees them, in OpenAI's format. Their texts are fixed, so that no internals
leak."""

from __future__ import annotations

import logging
import re
from math import ceil
from typing import Any

from starlette.requests import ClientDisconnect

from earlyfusion.errors import ContextError, EarlyFusionError, OutOfMemoryError, WeightsError
from earlyfusion.serve.driver import (
    EngineFailedError,
    NotReadyError,
    QueueFullError,
    RequestTimeoutError,
)

log = logging.getLogger("earlyfusion.serve")
_FIELD = re.compile(r"^([a-z_]+)=")


class ApiError(Exception):
    """An error reply: its HTTP status, and the fields of OpenAI's error object. The headers are
    added to the reply's own."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def type(self) -> str:
        names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return names.get(self.status, default)

    @property
    def body(self) -> dict[str, Any]:
        """{"error": …} as every client of OpenAI's API reads it."""
        error = {"message": self.message, "type": self.type}
        return {"error": error | {"param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """The error that a client sees."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        message = (
            f"the server is full: {error.limit} requests are under way or waiting, the limit; "
            f"ask again in {ceil(error.seconds)} s"
        )
        return ApiError(429, message, code="queue_full", headers=_retry(error.seconds))
    if isinstance(error, NotReadyError):
        message = str(error) or "the server is starting or shutting down: ask again in a moment"
        return ApiError(503, message, code="not_ready", headers=_retry(5))
    if isinstance(error, RequestTimeoutError):
        message = "the reply took longer than the server allows: ask for fewer tokens or images"
        return ApiError(504, message, code="timeout")
    if isinstance(error, EngineFailedError):
        message = "the engine failed while this request ran: ask it again"
        return ApiError(503, message, code="engine_failed", headers=_retry(1))
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, str(error), code="out_of_memory", headers=_retry(1))
    if isinstance(error, ClientDisconnect):  # while it sent the body; the status is for the log
        return ApiError(499, "the client has left")
    if isinstance(error, WeightsError):
        return ApiError(500, str(error), code="weights")
    if isinstance(error, EarlyFusionError):
        return _user_error(error)
    return ApiError(500, "the server failed on this request: its log says why", code="internal")


def report(error: BaseException) -> ApiError:
    """As `as_api_error`; also logs an unexpected error."""
    api_error = as_api_error(error)
    if api_error.code == "internal":
        log.error("a request failed", exc_info=error)
    return api_error


def _user_error(error: EarlyFusionError) -> ApiError:
    # Errors about a setting begin with its name, as "top_p=2 is not possible".
    field = _FIELD.match(str(error))
    code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_value"
    return ApiError(400, str(error), param=field and field[1], code=code)


def _retry(seconds: float) -> dict[str, str]:
    # OpenAI's SDKs wait for the milliseconds, others for the whole seconds.
    return {"Retry-After": str(ceil(seconds)), "Retry-After-Ms": str(round(1000 * seconds))}
