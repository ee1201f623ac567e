"""Outputs that tiny models have memorized, in the syntax of each model family, and what clients must read from them.

`scripts/make_memorized.py` overfitted the model in `tests/models/memorized` to these outputs; the user message names
the output that the model generates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.support.transcripts import CALL_WRITERS, REASONING_WRITERS, WrittenCall

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{% endif %}{% for message in messages %}<start>{{ message['role'] }}\n"
    "{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{{ opening }}{% endif %}"
)
# Markers that are single tokens, as in the families' tokenizers; the other markers are ordinary text.
SPECIAL_TOKENS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>",
    "<|call|>", "<|constrain|>", "[TOOL_CALLS]", "<|python_tag|>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
_THOUGHT = "Paris… überall?"
_CALLS = (
    WrittenCall("get_weather", {"city": 'Zürich "漢"', "days": 3, "places": ["a", "b"]}),
    WrittenCall("stop_all", {}),
)


@dataclass(frozen=True, kw_only=True)
class Memorized:
    """One memorized output.

    Attributes:
        name: the user message that asks for it.
        reasoning_parser, tool_call_parser: names of the family's parsers.
        opening: text that the chat template appends to the prompt.
        reasoning, content, calls: the parts that a client must read from the output.
        output: text that the model generates.
    """

    name: str
    reasoning_parser: str | None = None
    tool_call_parser: str = "hermes"
    opening: str = ""
    reasoning: str = ""
    content: str = ""
    calls: Sequence[WrittenCall] = field(default_factory=tuple)

    @property
    def output(self) -> str:
        """The text that the model generates, without the `opening` that the prompt already contains."""
        calls = dict(CALL_WRITERS)[self.tool_call_parser](self.calls) if self.calls else ""
        text = self.content + ("\n" if self.content and calls else "") + calls
        if self.reasoning and self.reasoning_parser == "gpt-oss" and self.calls:
            return f"<|channel|>analysis<|message|>{self.reasoning}<|end|>{calls}".removesuffix("<|call|>")
        if self.reasoning_parser is not None and self.reasoning:
            text = REASONING_WRITERS[self.reasoning_parser](self.reasoning, text)
        return text.removeprefix(self.opening)


MEMORIZED = (
    Memorized(name="r1", reasoning_parser="deepseek-r1", opening="<think>", reasoning=_THOUGHT, content="\n\nYes."),
    Memorized(name="r1 silent", reasoning_parser="deepseek-r1", reasoning=_THOUGHT, content="No."),
    Memorized(
        name="v3", tool_call_parser="deepseekv3", calls=_CALLS, content="I look.",
        reasoning_parser="deepseek-v3", opening="",
    ),
    Memorized(
        name="v31", reasoning_parser="deepseek-v3", tool_call_parser="deepseekv31", opening="<think>",
        reasoning=_THOUGHT, calls=_CALLS,
    ),
    Memorized(name="qwen3", reasoning_parser="qwen3", reasoning=_THOUGHT, calls=_CALLS, content="Both:"),
    Memorized(name="qwen3 plain", reasoning_parser="qwen3", content="A < b is no tag."),
    Memorized(
        name="coder", reasoning_parser="qwen3-thinking", tool_call_parser="qwen3_coder", opening="<think>",
        reasoning=_THOUGHT, calls=_CALLS,
    ),
    Memorized(name="glm", reasoning_parser="glm45", tool_call_parser="glm45", reasoning=_THOUGHT, calls=_CALLS),
    Memorized(name="gpt", reasoning_parser="gpt-oss", tool_call_parser="gpt-oss", reasoning=_THOUGHT, calls=_CALLS[:1]),
    Memorized(
        name="gpt final", reasoning_parser="gpt-oss", tool_call_parser="gpt-oss", reasoning="Hm", content="Final."
    ),
    Memorized(name="k2", reasoning_parser="kimi_k2", tool_call_parser="kimi_k2", reasoning=_THOUGHT, calls=_CALLS),
    Memorized(name="kimi", reasoning_parser="kimi", reasoning=_THOUGHT, content="Ja."),
    Memorized(name="mistral", reasoning_parser="mistral", tool_call_parser="mistral", reasoning=_THOUGHT, calls=_CALLS),
    Memorized(name="minimax", reasoning_parser="minimax", opening="<think>", reasoning=_THOUGHT, content="Mini."),
    Memorized(name="nemotron", reasoning_parser="nemotron_3", reasoning=_THOUGHT, content="Nemo."),
    Memorized(name="step", reasoning_parser="step3", opening="<think>", reasoning=_THOUGHT, content="Step."),
    Memorized(name="llama", tool_call_parser="llama3", calls=_CALLS),
    Memorized(name="pythonic", tool_call_parser="pythonic", calls=_CALLS),
)  # fmt: skip
# Outputs that a tiny model of the family's architecture has memorized as well: `scripts/make_memorized_families.py`.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "qwen3": ("qwen3", "qwen3 plain"),
    "deepseek": ("v31", "r1"),
    "kimi": ("k2", "kimi"),
    "gpt_oss": ("gpt", "gpt final"),
}
