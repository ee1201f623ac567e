"""The single mapping from jaxserve's exceptions to HTTP status codes and OpenAI's error object."""

import logging
import uuid
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, SerializationException, ValidationException

from api.requests.schemas import ErrorBody, ErrorInfo
from jaxserve.errors import NotFoundError, OverloadedError, RequestError, UnavailableError

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class GenerationError(Exception):
    """A choice ended with an error that is the server's fault."""


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
) -> Response[ErrorBody]:
    """Build an error response."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    body = ErrorBody(ErrorInfo(message, _TYPES.get(status, "server_error"), param, code))
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def to_response(error: Exception) -> Response[ErrorBody]:
    """Map an exception to its error response."""
    match error:
        case NotFoundError():
            return error_response(404, str(error), param=error.param, code=error.code)
        case RequestError():
            return error_response(400, str(error), param=error.param, code=error.code)
        case OverloadedError():
            return error_response(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
        case UnavailableError():
            return error_response(503, str(error), code="unavailable", retry_after_s=error.retry_after_s)
        case GenerationError():
            return error_response(500, str(error), code="generation_failed")
        case ValidationException():
            return _validation(error)
        case SerializationException() | msgspec.DecodeError() | UnicodeDecodeError() | RecursionError():
            return error_response(400, f"the body is not valid JSON: {_first_line(error)}")
        case HTTPException():
            return error_response(error.status_code, error.detail or type(error).__name__)
        case _:
            return _internal(error)


def handle(_: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Litestar's exception handler."""
    return to_response(error)


def stream_error(error: Exception) -> ErrorBody:
    """Map an exception to the payload of an event, for a stream whose headers have already been sent."""
    return to_response(error).content


def _validation(error: ValidationException) -> Response[ErrorBody]:
    extra: Any = error.extra
    first: dict[str, Any] = extra[0] if isinstance(extra, list) and extra else {}
    param = first.get("key")
    message = str(first.get("message") or error.detail)
    return error_response(400, f"{param}: {message}" if param else message, param=param)


def _internal(error: Exception) -> Response[ErrorBody]:
    # The text may reveal paths and internals: log it, and give the client only a reference to the log entry.
    reference = uuid.uuid4().hex
    logger.error("internal error %s", reference, exc_info=error)
    return error_response(500, f"internal error; reference {reference}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
