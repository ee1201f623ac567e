"""Starting and ending one conversation: code shared by all chat protocols."""

import uuid

from api.chat.build import build_chat
from api.chat.schemas import ChatCompletionRequest
from api.requests.builder import RequestBuilder, build
from api.requests.running import RunningRequest
from api.server import Server
from jaxserve.request import FinishReason


class CallIds:
    """Assigns ids to the tool calls of one response.

    Args:
        characters: length of the ids if the model's template requires one; None for OpenAI's format.
    """

    def __init__(self, characters: int | None) -> None:
        self._characters = characters

    def of(self, own: str | None) -> str:
        """Return the id of a new call: the model's `own` id if there is one, else a fresh one."""
        if own is not None:
            return own
        fresh = uuid.uuid4().hex
        return f"call_{fresh[:24]}" if self._characters is None else fresh[: self._characters]


async def start_chat(
    server: Server, builder: RequestBuilder, body: ChatCompletionRequest, endpoint: str, answer_id: str, size: int
) -> RunningRequest:
    """Build, check and start the request of a conversation; the caller must close the result.

    Args:
        server: shared state of the server.
        builder: builds engine requests.
        body: the conversation.
        endpoint: name of the endpoint in logs and metrics.
        answer_id: id of the response.
        size: size of the HTTP body in bytes.
    """
    prepared = await build(size, build_chat, builder, body)
    await server.check_grammar(prepared)
    return RunningRequest(server, endpoint, answer_id, [prepared])


def finish_reason(reason: FinishReason, *, called: bool) -> str:
    """Return OpenAI's finish reason: `tool_calls` if a message stops after at least one complete call."""
    return "tool_calls" if called and reason is FinishReason.STOP else str(reason)
