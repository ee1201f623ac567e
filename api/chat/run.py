"""One conversation being answered: what all chat protocols share."""

import uuid

from api.chat.build import build_chat
from api.chat.schemas import ChatCompletionRequest
from api.requests.builder import RequestBuilder, build
from api.requests.running import RunningRequest
from api.server import Server
from jaxserve.request import FinishReason


class CallIds:
    """Ids of one answer's tool calls.

    Args:
        characters: their length, where the model's template wants one; None for OpenAI's.
    """

    def __init__(self, characters: int | None) -> None:
        self._characters = characters

    def of(self, own: str | None) -> str:
        """The id of a new call: the model's own, or a fresh one."""
        if own is not None:
            return own
        fresh = uuid.uuid4().hex
        return f"call_{fresh[:24]}" if self._characters is None else fresh[: self._characters]


async def start_chat(
    server: Server, builder: RequestBuilder, body: ChatCompletionRequest, endpoint: str, answer_id: str, size: int
) -> RunningRequest:
    """Build, check and start a conversation; the result must be closed.

    Args:
        server: shared state.
        builder: builds engine requests.
        body: the conversation.
        endpoint: name in logs and metrics.
        answer_id: id of the answer.
        size: size of the body, in bytes.
    """
    prepared = await build(size, build_chat, builder, body)
    await server.check_grammar(prepared)
    return RunningRequest(server, endpoint, answer_id, [prepared])


def finish_reason(reason: FinishReason, *, called: bool) -> str:
    """In OpenAI's words: a message that stops with complete calls in it ended for them."""
    return "tool_calls" if called and reason is FinishReason.STOP else str(reason)
