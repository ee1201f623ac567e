"""Messages to a prompt, through the model's own Jinja template.

Rendering is transformers' (an immutable sandbox). The template comes from the model folder or the command line,
never from a request, and a request cannot reach the renderer's own arguments.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from jaxserve.errors import RequestError

# Arguments of the renderer, not variables of a template.
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
BUILT_IN_TEMPLATES: Mapping[str, str] = {"chatml": CHATML}


class ChatTemplate:
    """One model's template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
        self._tokenizer = tokenizer
        self.source = template

    def render(
        self, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any], *, continue_final_message: bool = False
    ) -> str:
        """Render a conversation up to the place where the assistant speaks.

        Args:
            messages: roles and string contents.
            kwargs: further variables of the template (`chat_template_kwargs`).
            continue_final_message: leave the last message open, to be continued.

        Raises:
            RequestError: the model has no template, a reserved name is used, or the template refuses.
        """
        if self.source is None:
            raise RequestError("the model has no chat template; use /v1/completions or give --chat-template")
        for name in kwargs:
            if name in RESERVED_KWARGS:
                raise RequestError(f"chat_template_kwargs must not contain {name!r}", param="chat_template_kwargs")
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        except (TemplateError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None
        return str(rendered)
