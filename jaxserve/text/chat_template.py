"""Renders messages to a prompt with the model's Jinja chat template.

transformers does the rendering, in an immutable sandbox. The template comes from the model folder or the command line,
never from a request, and a request cannot set the renderer's own arguments.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from jaxserve.errors import RequestError

# Arguments of the renderer, which are not template variables.
RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# For templates without tool support; the model is asked for calls in the Hermes format.
_TOOL_PROMPT = """You can call these functions, one JSON description per line:
{tools}

To call one, answer with this, and with nothing after it:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>"""
_REFUSALS = (TemplateError, ValueError, TypeError, KeyError, OverflowError, RecursionError)
BUILT_IN_TEMPLATES: Mapping[str, str] = {"chatml": CHATML}


class ChatTemplate:
    """The chat template of one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        self._tokenizer = tokenizer
        self.source = template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Render a conversation up to the start of the assistant's answer.

        Args:
            messages: messages with roles and string contents.
            kwargs: additional template variables (`chat_template_kwargs`).
            tools: tool definitions; a template without tool support gets them in the system message.
            continue_final_message: leave the last message open, to be continued.

        Raises:
            RequestError: the model has no template, a reserved name is used, or the template rejects the messages.
        """
        if self.source is None:
            raise RequestError("the model has no chat template; use /v1/completions or give --chat-template")
        for name in kwargs:
            if name in RESERVED_KWARGS:
                raise RequestError(f"chat_template_kwargs must not contain {name!r}", param="chat_template_kwargs")
        turns = [dict(message) for message in messages]
        if tools and "tools" not in self.source:
            turns, tools = _with_tools(turns, tools), None
        try:
            return self._render(turns, kwargs, tools, continue_final_message=continue_final_message)
        except _REFUSALS as error:
            refusal = error
        if tools:
            # Some templates expect the function definitions without the enclosing tool objects.
            flat = [tool["function"] for tool in tools]
            with contextlib.suppress(*_REFUSALS):
                return self._render(turns, kwargs, flat, continue_final_message=continue_final_message)
        raise RequestError(f"the chat template refuses these messages: {refusal}", param="messages")

    def _render(
        self,
        turns: list[dict[str, Any]],
        kwargs: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        continue_final_message: bool,
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                turns,
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        )


def _with_tools(turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation with the tools in its system message, and with calls and their results as text."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    system = _TOOL_PROMPT.format(tools=listed)
    if turns[0]["role"] == "system":
        system = f"{turns[0]['content']}\n\n{system}"
        turns = turns[1:]
    return [{"role": "system", "content": system}, *map(_as_text, turns)]


def _as_text(turn: dict[str, Any]) -> dict[str, Any]:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    content = "\n".join([turn["content"]] * bool(turn["content"]) + [f"<tool_call>\n{c}\n</tool_call>" for c in calls])
    return {**turn, "content": content}
