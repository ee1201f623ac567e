"""Tool-call formats under SGLang's names. A new format needs a parser, a syntax and an entry here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxserve.parsing.harmony import MARKERS as HARMONY_MARKERS
from jaxserve.parsing.tool_calls.harmony_calls import HarmonyParser, HarmonySyntax
from jaxserve.parsing.tool_calls.json_calls import HermesParser, Llama3Parser, MistralParser
from jaxserve.parsing.tool_calls.parser import ToolCallParser
from jaxserve.parsing.tool_calls.pythonic import PythonicParser
from jaxserve.parsing.tool_calls.sections import DeepSeekV3Parser, DeepSeekV31Parser, KimiK2Parser
from jaxserve.parsing.tool_calls.syntax import CallSyntax, JsonArguments, KeywordArguments, Section, TaggedArguments
from jaxserve.parsing.tool_calls.tool import Tool
from jaxserve.parsing.tool_calls.xml_calls import Glm45Parser, Qwen3CoderParser


@dataclass(frozen=True, kw_only=True)
class ToolCallFormat:
    """The way in which a model family writes tool calls.

    Attributes:
        parser: creates the parser of one output.
        syntax: writes the grammars of calls.
        markers: markers that must reach the parser even if they are special tokens.
        id_characters: length of the call ids that this family's templates accept; None for ids in OpenAI's format.
    """

    parser: Callable[[Sequence[Tool]], ToolCallParser]
    syntax: CallSyntax
    markers: tuple[str, ...] = ()
    id_characters: int | None = None


_HERMES = ToolCallFormat(
    parser=HermesParser,
    syntax=Section(
        before='<tool_call>\n{"name": "{name}", "arguments": ',
        after="}\n</tool_call>",
        trigger="<tool_call>",
        arguments=JsonArguments(),
    ),
    markers=("<tool_call>", "</tool_call>"),
)
_DEEPSEEK_MARKERS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip

TOOL_CALL_FORMATS: Mapping[str, ToolCallFormat] = {
    "deepseekv3": ToolCallFormat(
        parser=DeepSeekV3Parser,
        syntax=Section(
            begin="<｜tool▁calls▁begin｜>",
            before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            after="\n```<｜tool▁call▁end｜>",
            end="<｜tool▁calls▁end｜>",
            trigger="<｜tool▁calls▁begin｜>",
            arguments=JsonArguments(),
        ),
        markers=_DEEPSEEK_MARKERS,
    ),
    "deepseekv31": ToolCallFormat(
        parser=DeepSeekV31Parser,
        syntax=Section(
            begin="<｜tool▁calls▁begin｜>",
            before="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            after="<｜tool▁call▁end｜>",
            separator="",
            end="<｜tool▁calls▁end｜>",
            trigger="<｜tool▁calls▁begin｜>",
            arguments=JsonArguments(),
        ),
        markers=_DEEPSEEK_MARKERS,
    ),
    "glm45": ToolCallFormat(
        parser=Glm45Parser,
        syntax=Section(
            before="<tool_call>{name}\n",
            after="</tool_call>",
            trigger="<tool_call>",
            arguments=TaggedArguments(
                before="<arg_key>{key}</arg_key>\n<arg_value>", after="</arg_value>\n"
            ),
        ),
        markers=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "gpt-oss": ToolCallFormat(parser=HarmonyParser, syntax=HarmonySyntax(), markers=HARMONY_MARKERS),
    "hermes": _HERMES,
    "kimi_k2": ToolCallFormat(
        parser=KimiK2Parser,
        syntax=Section(
            begin="<|tool_calls_section_begin|>",
            before="<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>",
            after="<|tool_call_end|>",
            separator="",
            end="<|tool_calls_section_end|>",
            trigger="<|tool_calls_section_begin|>",
            arguments=JsonArguments(),
        ),
        markers=(
            "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
            "<|tool_call_argument_begin|>",
        ),
    ),
    "llama3": ToolCallFormat(
        parser=Llama3Parser,
        syntax=Section(
            before='{"name": "{name}", "parameters": ', after="}", separator="; ", arguments=JsonArguments()
        ),
        markers=("<|python_tag|>",),
    ),
    "mistral": ToolCallFormat(
        parser=MistralParser,
        syntax=Section(
            begin="[TOOL_CALLS] [",
            before='{"name": "{name}", "arguments": ',
            after="}",
            separator=", ",
            end="]",
            trigger="[TOOL_CALLS]",
            arguments=JsonArguments(),
        ),
        markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        id_characters=9,
    ),
    "pythonic": ToolCallFormat(
        parser=PythonicParser,
        syntax=Section(
            begin="[", before="{name}(", after=")", separator=", ", end="]", arguments=KeywordArguments()
        ),
        markers=("<|python_start|>", "<|python_end|>"),
    ),
    "qwen": _HERMES,
    "qwen25": _HERMES,
    "qwen3_coder": ToolCallFormat(
        parser=Qwen3CoderParser,
        syntax=Section(
            before="<tool_call>\n<function={name}>\n",
            after="</function>\n</tool_call>",
            trigger="<tool_call>",
            arguments=TaggedArguments(before="<parameter={key}>\n", after="\n</parameter>\n"),
        ),
        markers=("<tool_call>", "</tool_call>"),
    ),
}  # fmt: skip

# The first format whose sign occurs in the template is used.
_SIGNS = (
    ("gpt-oss", "<|channel|>"),
    ("kimi_k2", "<|tool_calls_section_begin|>"),
    ("deepseekv3", "```json"),
    ("deepseekv31", "<｜tool▁calls▁begin｜>"),
    ("mistral", "[TOOL_CALLS]"),
    ("qwen3_coder", "<function="),
    ("glm45", "<arg_key>"),
    ("llama3", "<|python_tag|>"),
    ("pythonic", "<|python_start|>"),
    ("hermes", "<tool_call>"),
    ("llama3", '"parameters":'),
)


def detect_tool_calls(template: str) -> str | None:
    """Return the name of the format that a chat template writes, or None if it writes no calls."""
    for name, sign in _SIGNS:
        if sign in template and (name != "deepseekv3" or "<｜tool▁calls▁begin｜>" in template):
            return name
    return None
