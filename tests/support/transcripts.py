"""Writers of model outputs in every family's syntax, from the tool calls, reasoning and content they contain."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxserve.parsing.tool_calls.tool import Tool


class WrittenCall(NamedTuple):
    """A tool call, before it is written in a family's syntax."""

    name: str
    arguments: dict[str, Any]


TOOLS = (
    Tool(
        name="get_weather",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "share": {"type": "number"},
                "metric": {"type": "boolean"},
                "places": {"type": "array", "items": {"type": "string"}},
                "options": {"type": "object"},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    ),
    Tool(name="stop_all"),
)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _hermes(calls: Sequence[WrittenCall]) -> str:
    bodies = (_json({"name": call.name, "arguments": call.arguments}) for call in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _llama3(calls: Sequence[WrittenCall]) -> str:
    return "; ".join(_json({"name": call.name, "parameters": call.arguments}) for call in calls)


def _mistral(calls: Sequence[WrittenCall]) -> str:
    return "[TOOL_CALLS] " + _json([{"name": call.name, "arguments": call.arguments} for call in calls])


def _mistral_named(calls: Sequence[WrittenCall]) -> str:
    return "".join(f"[TOOL_CALLS]{call.name}[ARGS]{_json(call.arguments)}" for call in calls)


def _deepseekv3(calls: Sequence[WrittenCall]) -> str:
    bodies = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{_json(call.arguments)}\n```<｜tool▁call▁end｜>"
        for call in calls
    )
    return f"<｜tool▁calls▁begin｜>{chr(10).join(bodies)}<｜tool▁calls▁end｜>"


def _deepseekv31(calls: Sequence[WrittenCall]) -> str:
    bodies = (
        f"<｜tool▁call▁begin｜>{call.name}<｜tool▁sep｜>{_json(call.arguments)}<｜tool▁call▁end｜>" for call in calls
    )
    return f"<｜tool▁calls▁begin｜>{''.join(bodies)}<｜tool▁calls▁end｜>"


def _kimi_k2(calls: Sequence[WrittenCall]) -> str:
    bodies = (
        f"<|tool_call_begin|>functions.{call.name}:{index}<|tool_call_argument_begin|>{_json(call.arguments)}"
        "<|tool_call_end|>"
        for index, call in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{''.join(bodies)}<|tool_calls_section_end|>"


def _gpt_oss(calls: Sequence[WrittenCall]) -> str:
    return "".join(
        f"<|start|>assistant<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>"
        f"{_json(call.arguments)}<|call|>"
        for call in calls
    )


def _pythonic(calls: Sequence[WrittenCall]) -> str:
    written = (
        f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})" for call in calls
    )
    return f"[{', '.join(written)}]"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _qwen3_coder(calls: Sequence[WrittenCall]) -> str:
    def body(call: WrittenCall) -> str:
        lines = [f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in call.arguments.items()]
        return f"<tool_call>\n<function={call.name}>\n{''.join(lines)}</function>\n</tool_call>"

    return "\n".join(map(body, calls))


def _glm45(calls: Sequence[WrittenCall]) -> str:
    def body(call: WrittenCall) -> str:
        lines = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n"
            for key, value in call.arguments.items()
        ]
        return f"<tool_call>{call.name}\n{''.join(lines)}</tool_call>"

    return "\n".join(map(body, calls))


# (name of a parser, function that writes calls in the parser's syntax)
CALL_WRITERS: Sequence[tuple[str, Callable[[Sequence[WrittenCall]], str]]] = (
    ("deepseekv3", _deepseekv3),
    ("deepseekv31", _deepseekv31),
    ("glm45", _glm45),
    ("gpt-oss", _gpt_oss),
    ("hermes", _hermes),
    ("kimi_k2", _kimi_k2),
    ("llama3", _llama3),
    ("mistral", _mistral),
    ("mistral", _mistral_named),
    ("pythonic", _pythonic),
    ("qwen", _hermes),
    ("qwen25", _hermes),
    ("qwen3_coder", _qwen3_coder),
)


def _tags(start: str, end: str) -> Callable[[str, str], str]:
    return lambda reasoning, content: f"{start}{reasoning}{end}{content}"


def _channels(reasoning: str, content: str) -> str:
    return f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant<|channel|>final<|message|>{content}"


THINK = _tags("<think>", "</think>")
REASONING_WRITERS: Mapping[str, Callable[[str, str], str]] = {
    "deepseek-r1": THINK,
    "deepseek-v3": THINK,
    "glm45": THINK,
    "gpt-oss": _channels,
    "kimi": _tags("◁think▷", "◁/think▷"),
    "kimi_k2": THINK,
    "minimax": THINK,
    "mistral": _tags("[THINK]", "[/THINK]"),
    "nemotron_3": THINK,
    "qwen3": THINK,
    "qwen3-thinking": THINK,
    "step3": THINK,
}
