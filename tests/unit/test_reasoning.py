"""The reasoning formats: whether an output starts in reasoning, and how odd outputs are parsed."""

import pytest

from jaxserve.parsing.message import Message
from jaxserve.parsing.message_parser import MessageParserConfig
from jaxserve.parsing.reasoning.registry import REASONING_FORMATS


@pytest.mark.parametrize(
    ("name", "prompt", "in_reasoning"),
    [
        ("deepseek-r1", "<｜Assistant｜><think>\n", True),
        ("deepseek-r1", "<｜Assistant｜>", None),
        ("deepseek-v3", "<｜Assistant｜><think>", True),
        ("deepseek-v3", "<｜Assistant｜></think>", False),
        ("qwen3", "<|im_start|>assistant\n", None),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "user: what does <think> mean?\nassistant:", None),
        ("glm45", "<|assistant|>\n<think></think>", False),
        ("kimi", "assistant◁think▷", True),
        ("mistral", "[/INST]", None),
        ("gpt-oss", "<|start|>assistant", None),
        ("gpt-oss", "<|start|>assistant<|channel|>analysis<|message|>", True),
    ],
)
def test_starts_in_reasoning_from_prompt_end(name: str, prompt: str, in_reasoning: bool | None) -> None:
    assert REASONING_FORMATS[name].starts_in_reasoning(prompt) is in_reasoning


@pytest.mark.parametrize(
    ("message", "in_reasoning"),
    [("<think>a", True), ("<think>a</think>b", False), ("a", None), ("</think><think>", True)],
)
def test_a_continued_message_tells(message: str, in_reasoning: bool | None) -> None:
    assert REASONING_FORMATS["qwen3"].continues_in_reasoning(message) is in_reasoning


@pytest.mark.parametrize(
    ("name", "in_reasoning", "text", "reasoning", "content"),
    [
        ("deepseek-r1", True, "a</think>b", "a", "b"),
        ("deepseek-r1", None, "a</think>b", "a", "b"),
        ("deepseek-r1", True, "no end", "no end", ""),
        ("deepseek-r1", True, "<think><think>a</think>b", "a", "b"),
        ("deepseek-r1", False, "an answer", "", "an answer"),
        ("qwen3", None, "an answer", "", "an answer"),
        ("qwen3", None, "<think>a</think>b</think>c", "a", "b</think>c"),
        ("qwen3", None, "<think>a<tool_call>{}</tool_call>", "a", "<tool_call>{}</tool_call>"),
        ("qwen3", False, "the tag <think> is literal", "", "the tag <think> is literal"),
        ("qwen3", True, "a <think> inside</think>b", "a <think> inside", "b"),
        ("kimi_k2", None, "<think>a<|tool_calls_section_begin|>", "a", "<|tool_calls_section_begin|>"),
        ("kimi", None, "<think>a</think>b", "", "<think>a</think>b"),
        ("gpt-oss", None, "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b", "a", "b"),
        ("gpt-oss", None, "<|channel|>commentary<|message|>a<|end|>", "", "a"),
        ("gpt-oss", None, "<|channel|>secret<|message|>a<|end|><|channel|>final<|message|>b", "", "b"),
        ("gpt-oss", None, "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", "", "{}"),
        ("gpt-oss", None, "analysisaassistantfinalb", "a", "b"),
        ("gpt-oss", None, "analysis is hard", "", "analysis is hard"),
        ("gpt-oss", None, "<|channel|>ana", "", ""),
    ],
)  # fmt: skip
def test_odd_outputs(name: str, in_reasoning: bool | None, text: str, reasoning: str, content: str) -> None:
    parser = MessageParserConfig(reasoning=REASONING_FORMATS[name], in_reasoning=in_reasoning).parser()
    message = Message().add([*parser.push(text), *parser.finish()])
    assert (message.reasoning, message.content) == (reasoning, content)


def test_a_grammar_tells_where_thinking_is() -> None:
    """Constrained content may contain the tags as text, and a tool-call marker does not interrupt the thinking."""
    format = REASONING_FORMATS["qwen3"]
    for text, reasoning, content in (
        ('{"a": "<think>"}', "", '{"a": "<think>"}'),
        ('<think>x <tool_call> y</think>{"a": 1}', "x <tool_call> y", '{"a": 1}'),
    ):
        parser = MessageParserConfig(reasoning=format, constrained=True).parser()
        message = Message().add([*parser.push(text), *parser.finish()])
        assert (message.reasoning, message.content) == (reasoning, content)
