"""Reasoning formats under SGLang's names. A new format needs one line here, and a file if it does not use tags."""

from collections.abc import Mapping
from typing import Protocol

from jaxserve.parsing.reasoning.channels import Channels
from jaxserve.parsing.reasoning.tags import Tags
from jaxserve.parsing.stream_parser import StreamParser
from jaxserve.structured.grammar import GrammarPrefix, GrammarWriter


class ReasoningFormat(Protocol):
    """The way in which a model family marks its thinking."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Markers that must reach the parser even if they are special tokens."""
        ...

    @property
    def start(self) -> str:
        """Marker that starts thinking in an output."""
        ...

    @property
    def end(self) -> str:
        """Marker that ends thinking."""
        ...

    @property
    def early_end_markers(self) -> tuple[str, ...]:
        """Markers that end thinking early and are part of the content that follows."""
        ...

    @property
    def allows_multiple(self) -> bool:
        """Whether an output may contain several thinking sections."""
        ...

    @property
    def force_reasoning(self) -> bool:
        """Whether an output starts inside thinking if the end of the prompt does not determine it."""
        ...

    def end_marker(self, *, calls: bool) -> str:
        """Return the text that is forced to end thinking before tool calls (if `calls`) or before content."""
        ...

    def starts_in_reasoning(self, prompt: str) -> bool | None:
        """Return whether an output starts inside thinking; None if the end of the prompt does not determine it."""
        ...

    def continues_in_reasoning(self, message: str) -> bool | None:
        """Return whether the continuation of an assistant message starts inside thinking; None if unknown."""
        ...

    def parser(self, in_reasoning: bool | None, *, keeps_calls: bool, constrained: bool) -> StreamParser:
        """Create a parser of one output.

        Args:
            in_reasoning: whether the output starts inside thinking; None if unknown.
            keeps_calls: leave tool calls in the content as written, for the tool-call parser.
            constrained: whether the output follows the grammar of this format.
        """
        ...

    def grammar(self, writer: GrammarWriter, in_reasoning: bool | None, *, calls: bool) -> GrammarPrefix:
        """Return the grammar of the text before a constrained output, such as thinking.

        Args:
            writer: writer of the model's grammars.
            in_reasoning: whether the output starts inside thinking; None if unknown.
            calls: whether the constrained output is tool calls instead of content.
        """
        ...


_TOOL_CALL = ("<tool_call>",)

REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "deepseek-r1": Tags(force_reasoning=True),
    "deepseek-v3": Tags(early_end_markers=_TOOL_CALL),
    "glm45": Tags(early_end_markers=_TOOL_CALL),
    "gpt-oss": Channels(),
    "kimi": Tags(start="◁think▷", end="◁/think▷"),
    "kimi_k2": Tags(early_end_markers=("<|tool_calls_section_begin|>",)),
    "minimax": Tags(early_end_markers=(*_TOOL_CALL, "<minimax:tool_call>"), force_reasoning=True),
    "mistral": Tags(start="[THINK]", end="[/THINK]"),
    "nemotron_3": Tags(early_end_markers=_TOOL_CALL),
    "qwen3": Tags(early_end_markers=_TOOL_CALL),
    "qwen3-thinking": Tags(early_end_markers=_TOOL_CALL, force_reasoning=True),
    "step3": Tags(force_reasoning=True),
}


def detect_reasoning(template: str) -> str | None:
    """Return the name of the format that a chat template writes, or None if the template has no thinking."""
    for name, signs in _SIGNS:
        if all(sign in template for sign in signs):
            return name
    return None


# The first format whose signs all occur in the template is used, so special cases come first. Where a request decides
# about thinking, a format with `force_reasoning` would be wrong.
_SIGNS = (
    ("gpt-oss", ("<|channel|>analysis",)),
    ("kimi", ("◁think▷",)),
    ("mistral", ("[THINK]",)),
    ("kimi_k2", ("<think>", "<|im_middle|>")),
    ("glm45", ("<think>", "[gMASK]")),
    ("minimax", ("<think>", "]~b]")),
    ("deepseek-v3", ("<｜Assistant｜>", "not thinking", "</think>")),
    ("deepseek-r1", ("<｜Assistant｜>", "</think>")),
    ("step3", ("<|BOT|>", "<think>")),
    ("nemotron_3", ("<think>", "<SPECIAL_")),
    ("qwen3", ("<think>",)),
)
