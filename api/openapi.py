"""What the OpenAPI document says beyond the handlers' types: OpenAI's error object, and streams."""

from http import HTTPStatus
from typing import Any

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, OpenAPIType, Operation, Schema

from api.requests.schemas import ErrorBody

_WITH_BODY = (400, 413, 415)
_ALWAYS = (401, 500, 503)


def errors(*statuses: int, body: bool = False) -> dict[int, ResponseSpec]:
    """Error answers of a route: the given ones, those of any route, and those of any route that takes a body."""
    codes = sorted({*statuses, *_ALWAYS, *(_WITH_BODY if body else ())})
    return {
        code: ResponseSpec(ErrorBody, description=HTTPStatus(code).phrase, generate_examples=False) for code in codes
    }


class StreamedOperation(Operation):
    """An operation whose answer is server-sent events when the body says `stream`."""

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
