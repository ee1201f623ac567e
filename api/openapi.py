"""Additions to the OpenAPI document that the handlers' types do not express: OpenAI's error object, and streams."""

from http import HTTPStatus
from typing import Any

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, OpenAPIType, Operation, Schema

from api.requests.schemas import ErrorBody

_WITH_BODY = (400, 413, 415)
_ALWAYS = (401, 500, 503)


def errors(*statuses: int, body: bool = False) -> dict[int, ResponseSpec]:
    """Return a route's error responses: `statuses`, those of every route, and with `body` those of invalid bodies."""
    codes = sorted({*statuses, *_ALWAYS, *(_WITH_BODY if body else ())})
    return {
        code: ResponseSpec(ErrorBody, description=HTTPStatus(code).phrase, generate_examples=False) for code in codes
    }


class StreamedOperation(Operation):
    """An operation whose response is server-sent events if the body sets `stream`."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        answer = (self.responses or {})["200"]
        assert isinstance(answer, OpenAPIResponse)
        text = Schema(type=OpenAPIType.STRING)
        events = Schema(
            type=OpenAPIType.OBJECT,
            description="one server-sent event; its data is a chunk or an event as JSON, or `[DONE]`",
            properties={"data": text, "event": text},
            required=["data"],
        )
        answer.content = {**(answer.content or {}), "text/event-stream": OpenAPIMediaType(schema=events)}
