"""Templates that combine a prompt and a suffix into one text, for models trained to fill in the middle."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.errors import LaunchError

_PROMPT, _SUFFIX = "{prompt}", "{suffix}"

COMPLETION_TEMPLATES: Mapping[str, str] = {
    "deepseek_coder": "<｜fim▁begin｜>{prompt}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
    "qwen_coder": "<|fim_prefix|>{prompt}<|fim_suffix|>{suffix}<|fim_middle|>",
    "star_coder": "<fim_prefix>{prompt}<fim_suffix>{suffix}<fim_middle>",
}


@dataclass(frozen=True)
class CompletionTemplate:
    """A template text with one `{prompt}` and one `{suffix}`."""

    text: str

    def __post_init__(self) -> None:
        if self.text.count(_PROMPT) != 1 or self.text.count(_SUFFIX) != 1:
            names = ", ".join(COMPLETION_TEMPLATES)
            raise LaunchError(
                f"--completion-template: one of {names}, or a text with {_PROMPT} and {_SUFFIX}, got {self.text[:80]!r}"
            )

    def render(self, prompt: str, suffix: str) -> str:
        """Return the text that the model continues with the part between prompt and suffix."""
        before, after = self.text.split(_PROMPT)
        # Prompt and suffix may contain placeholders themselves, so only the template is searched.
        if _SUFFIX in after:
            middle, end = after.split(_SUFFIX)
            return before + prompt + middle + suffix + end
        begin, middle = before.split(_SUFFIX)
        return begin + suffix + middle + prompt + after
