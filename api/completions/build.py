"""Builds engine requests from the body of `/v1/completions`."""

from typing import Any

from api.completions.schemas import CompletionRequest
from api.requests.builder import Prepared, RequestBuilder
from api.requests.constraints import read_constraint
from api.requests.fields import check_common, check_range
from jaxserve.errors import RequestError
from jaxserve.request import MAX_CHOICES
from jaxserve.sampling_params import MAX_LOGPROBS
from jaxserve.structured.grammar import GrammarPrefix, whole

_MAX_PROMPTS = 128
_DEFAULT_MAX_TOKENS = 16


def build_completions(builder: RequestBuilder, body: CompletionRequest) -> list[Prepared]:
    """Build one engine request per prompt.

    Raises:
        RequestError: a field is not valid; the message names the field, its value and the limit.
    """
    prompts = _prompts(body)
    model = builder.model.names.resolve(body.model, body.lora_path, num_prompts=len(prompts))
    check_common(body)
    num_choices = body.n or 1
    best_of = num_choices if body.best_of is None else body.best_of
    check_range("best_of", best_of, num_choices, MAX_CHOICES)
    if body.stream and best_of > num_choices:
        raise RequestError("best_of above n cannot be streamed", param="best_of")
    check_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    prompt_ids = [_prompt_ids(builder, prompt, body.suffix) for prompt in prompts]
    part, param = read_constraint(body, builder.model.grammars)
    grammar = "" if part is None else whole([(GrammarPrefix(), part)])
    # `best_of` ranks choices by their log-probabilities, even if the client does not request them.
    num_logprobs = 0 if body.logprobs is None and best_of > num_choices else body.logprobs
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    prepared: list[Prepared] = []
    for ids, key in zip(prompt_ids, model.adapter_keys, strict=True):
        sampling = builder.sampling(
            body,
            builder.model.generation.sampling,
            max_tokens=builder.max_tokens(len(ids), max_tokens, "prompt"),
            num_logprobs=num_logprobs,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        )
        request = builder.request(body, ids, sampling=sampling, num_choices=best_of, grammar=grammar, adapter_key=key)
        prepared.append(Prepared(model.name, request, builder.text_options(body), param))
    return prepared


def _prompts(body: CompletionRequest) -> list[Any]:
    """Return the prompts; each is text or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif prompt and all(isinstance(item, int) for item in prompt):
        prompts = [prompt]
    else:
        prompts = list(prompt)
    if not 1 <= len(prompts) <= _MAX_PROMPTS:
        raise RequestError(f"prompt must have 1 to {_MAX_PROMPTS} entries, got {len(prompts)}", param="prompt")
    return prompts


def _prompt_ids(builder: RequestBuilder, prompt: Any, suffix: str | None) -> list[int]:
    if suffix is not None:
        template = builder.model.completion_template
        if template is None:
            raise RequestError("suffix needs a server with --completion-template", param="suffix")
        if not isinstance(prompt, str):
            raise RequestError("suffix needs a prompt that is text", param="suffix")
        prompt = template.render(prompt, suffix)
    if isinstance(prompt, str):
        ids = builder.encode(prompt, add_special_tokens=True, param="prompt")
    elif isinstance(prompt, list):
        ids = prompt
        vocab_size = builder.model.info.vocab_size
        for token_id in ids:
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"prompt: token id {token_id!r} is outside the vocabulary of {vocab_size}", param="prompt"
                )
    else:
        raise RequestError("prompt must be text or token ids, not a mix of both", param="prompt")
    if not ids:
        raise RequestError("prompt must not be empty", param="prompt")
    return ids
