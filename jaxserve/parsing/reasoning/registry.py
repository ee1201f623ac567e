"""Reasoning formats by SGLang's names. A new one is one line here, or a file and a line."""

from collections.abc import Mapping
from typing import Protocol

from jaxserve.parsing.reasoning.channels import Channels
from jaxserve.parsing.reasoning.tags import Tags
from jaxserve.parsing.stream_parser import StreamParser
from jaxserve.structured.grammar import GrammarPrefix, GrammarWriter


class ReasoningFormat(Protocol):
    """How a family of models marks its thinking."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Text that a parser must see even where it is a special token."""
        ...

    @property
    def start(self) -> str:
        """What opens thinking in an output."""
        ...

    @property
    def end(self) -> str:
        """What closes it."""
        ...

    @property
    def early_end_markers(self) -> tuple[str, ...]:
        """What ends thinking early and belongs to what follows."""
        ...

    @property
    def allows_multiple(self) -> bool:
        """Whether an output may think several times."""
        ...

    @property
    def force_reasoning(self) -> bool:
        """Whether an output starts inside thinking if the prompt's end does not say."""
        ...

    def end_marker(self, *, calls: bool) -> str:
        """What is forced when thinking has to end, before content or before tool calls."""
        ...

    def starts_in_reasoning(self, prompt: str) -> bool | None:
        """Whether an output after this prompt starts inside thinking; None if the prompt's end does not say."""
        ...

    def continues_in_reasoning(self, message: str) -> bool | None:
        """The same for an output that continues a message of the assistant's."""
        ...

    def parser(self, in_reasoning: bool | None, *, keeps_calls: bool, constrained: bool) -> StreamParser:
        """A parser of one output.

        Args:
            in_reasoning: whether it starts inside thinking; None if it is unknown.
            keeps_calls: leave tool calls in the content as they were written, for another parser.
            constrained: the output follows the grammar of this format.
        """
        ...

    def grammar(self, writer: GrammarWriter, in_reasoning: bool | None, *, calls: bool) -> GrammarPrefix:
        """What comes before a constrained output.

        Args:
            writer: writer of the model's grammars.
            in_reasoning: whether the output starts inside thinking; None if it is unknown.
            calls: what is constrained are tool calls, not content.
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
    """The format that a chat template writes, or None if it knows no thinking."""
    for name, signs in _SIGNS:
        if all(sign in template for sign in signs):
            return name
    return None


# The first whose signs all stand in the template; special cases come first. Where thinking depends on the request, a
# format that presumes it would be wrong.
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
