"""Builds engine requests from the body of `/v1/chat/completions`; other chat protocols are translated to that body."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from api.chat.conversation import template_messages
from api.chat.schemas import ChatCompletionRequest, ChatMessage
from api.chat.tools import ToolUse, read_tools
from api.requests.builder import Prepared, RequestBuilder
from api.requests.constraints import read_constraint
from api.requests.fields import check_common, check_range
from api.service.schemas import TokenizeRequest
from jaxserve.errors import RequestError
from jaxserve.parsing.message_parser import MessageParserConfig
from jaxserve.parsing.reasoning.registry import ReasoningFormat
from jaxserve.request import ThinkingBudget
from jaxserve.sampling_params import MAX_LOGPROBS
from jaxserve.structured.grammar import GrammarPart, GrammarPrefix, whole

_MAX_BUDGET = 2**31 - 1


class RenderedPrompt(NamedTuple):
    """A conversation as the model reads it.

    Attributes:
        text: the prompt.
        in_reasoning: the output starts inside reasoning; None if the prompt does not show it.
    """

    text: str
    in_reasoning: bool | None


def build_chat(builder: RequestBuilder, body: ChatCompletionRequest) -> Prepared:
    """Build the engine request of one conversation.

    Raises:
        RequestError: a field is not valid; the message names the field, its value and the limit.
    """
    if body.lora_path is not None and not isinstance(body.lora_path, str):
        raise RequestError("lora_path must be a single adapter name for this endpoint", param="lora_path")
    model = builder.model.names.resolve(body.model, body.lora_path)
    check_common(body)
    check_range("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    tools = read_tools(body)
    prompt = _render_chat(builder, body, tools)
    # The chat template has already added the special tokens.
    ids = builder.encode(prompt.text, add_special_tokens=False, param="messages")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    grammar, param = _grammar(builder, body, tools, prompt.in_reasoning)
    request = builder.request(
        body,
        ids,
        sampling=builder.sampling(
            body,
            builder.model.generation.sampling,
            max_tokens=builder.max_tokens(len(ids), max_tokens, "messages"),
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        ),
        num_choices=body.n or 1,
        adapter_key=model.adapter_keys[0],
        grammar=grammar,
        thinking=_thinking(builder, body, prompt.in_reasoning, forced=tools is not None and tools.forced),
    )
    formats = builder.model.formats
    separate = body.separate_reasoning is not False
    message = MessageParserConfig(
        reasoning=formats.reasoning if separate else None,
        in_reasoning=prompt.in_reasoning,
        stream_reasoning=body.stream_reasoning is not False,
        tool_calls=None if tools is None else formats.tool_calls,
        tools=() if tools is None else tools.callable,
        single_call=tools is not None and not tools.parallel,
        constrained=bool(grammar),
    )
    markers = () if formats.reasoning is None else formats.reasoning.markers
    if tools is not None:
        markers += formats.tool_calls.markers
    kept = builder.model.tokenizer.special_ids_in(markers)
    return Prepared(model.name, request, builder.text_options(body, message=message, kept_ids=kept), param)


def count_prompt_tokens(builder: RequestBuilder, body: ChatCompletionRequest) -> int:
    """Count the prompt tokens of a conversation."""
    prompt = render(builder, body.messages, template_kwargs(body), read_tools(body))
    return len(builder.encode(prompt, add_special_tokens=False, param="messages"))


def tokenize(builder: RequestBuilder, body: TokenizeRequest) -> list[int]:
    """Return the token ids of a prompt, or of messages rendered with the chat template.

    Raises:
        RequestError: neither or both of `prompt` and `messages` are given, or they are not valid.
    """
    if body.messages is not None and body.prompt is None:
        tools = read_tools(ChatCompletionRequest(messages=[], tools=body.tools))
        text = render(builder, body.messages, body.chat_template_kwargs or {}, tools)
        return builder.encode(text, add_special_tokens=False, param="messages")
    if body.prompt is None or body.messages is not None:
        raise RequestError("exactly one of prompt and messages is required", param="prompt")
    return builder.encode(body.prompt, add_special_tokens=body.add_special_tokens, param="prompt")


def render(
    builder: RequestBuilder,
    messages: Sequence[ChatMessage],
    kwargs: dict[str, Any],
    tools: ToolUse | None,
    *,
    continue_final: bool = False,
) -> str:
    """Render messages to a prompt with the chat template.

    Raises:
        RequestError: the messages are not valid, or the template rejects them.
    """
    if continue_final and (not messages or messages[-1].role != "assistant"):
        raise RequestError(
            "continue_final_message needs the last message to be the assistant's", param="continue_final_message"
        )
    template = builder.model.tokenizer.chat_template
    turns = template_messages(messages, template.source or "")
    template_tools = None if tools is None else tools.template_tools
    return template.render(turns, kwargs, tools=template_tools, continue_final_message=continue_final)


def template_kwargs(body: ChatCompletionRequest) -> dict[str, Any]:
    """Return template variables: switches derived from the reasoning options, overridden by `chat_template_kwargs`."""
    options = body.reasoning
    effort = body.reasoning_effort or (None if options is None else options.effort)
    thinks = None if options is None else options.enabled
    if effort is not None:
        thinks = effort != "none" if thinks is None else thinks
    derived: dict[str, Any] = {} if thinks is None else {"thinking": thinks, "enable_thinking": thinks}
    if effort is not None:
        derived["reasoning_effort"] = effort
    return {**derived, **(body.chat_template_kwargs or {})}


def _render_chat(builder: RequestBuilder, body: ChatCompletionRequest, tools: ToolUse | None) -> RenderedPrompt:
    continues = bool(body.continue_final_message)
    text = render(builder, body.messages, template_kwargs(body), tools, continue_final=continues)
    reasoning, in_reasoning = builder.model.formats.reasoning, None
    if reasoning is not None:
        if continues:
            final = template_messages(body.messages[-1:], "")[0]["content"]
            in_reasoning = reasoning.continues_in_reasoning(final)
        if in_reasoning is None:
            in_reasoning = reasoning.starts_in_reasoning(text)
    return RenderedPrompt(text, in_reasoning)


def _grammar(
    builder: RequestBuilder, body: ChatCompletionRequest, tools: ToolUse | None, in_reasoning: bool | None
) -> tuple[str, str | None]:
    """Return the output's grammar (empty for none) and the request field that requires it."""
    writer, formats = builder.model.grammars, builder.model.formats
    content, param = read_constraint(body, writer)
    if content is None and tools is None:
        return "", None

    def before(*, calls: bool) -> GrammarPrefix:
        if formats.reasoning is None:
            return GrammarPrefix()
        return formats.reasoning.grammar(writer, in_reasoning, calls=calls)

    alternatives: list[tuple[GrammarPrefix, GrammarPart]] = []
    if tools is not None:
        calls = tools.grammar(writer, formats.tool_calls)
        if content is not None and not tools.forced:
            # The output is either content in the required format, or tool calls.
            calls = formats.tool_calls.syntax.calls(writer, tools.callable, parallel=tools.parallel)
        if calls is not None:
            alternatives.append((before(calls=True), calls))
            param = param or "tools"
    if content is not None and not (tools is not None and tools.forced):
        alternatives.append((before(calls=False), content))
    return (whole(alternatives) if alternatives else ""), param


def _thinking(
    builder: RequestBuilder, body: ChatCompletionRequest, in_reasoning: bool | None, *, forced: bool
) -> ThinkingBudget | None:
    """Return the thinking budget, if any; `forced` means that tool calls must follow the thinking."""
    if body.thinking_budget is None:
        return None
    check_range("thinking_budget", body.thinking_budget, 0, _MAX_BUDGET)
    reasoning: ReasoningFormat | None = builder.model.formats.reasoning
    if reasoning is None:
        raise RequestError("thinking_budget needs a server with --reasoning-parser", param="thinking_budget")
    if in_reasoning is False:
        return None
    end_marker = reasoning.end_marker(calls=forced)
    return ThinkingBudget(
        start=reasoning.start,
        end=reasoning.end,
        early_end_markers=reasoning.early_end_markers,
        allows_multiple=reasoning.allows_multiple,
        in_reasoning=bool(in_reasoning) or reasoning.force_reasoning,
        budget=body.thinking_budget,
        end_token_ids=tuple(builder.encode(end_marker, add_special_tokens=False, param="thinking_budget")),
    )
