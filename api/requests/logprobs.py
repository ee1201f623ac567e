"""Log-probabilities in the wire formats of the chat and the completions endpoint."""

from collections.abc import Iterable, Sequence

from api.requests.schemas import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from jaxserve.engine.output_processor import ChoiceToken
from jaxserve.request import TokenLogprobs
from jaxserve.text.tokenizer import Tokenizer

# JSON has no -inf; like OpenAI, report this value as the log-probability of a forbidden token.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ChoiceToken]) -> ChatLogprobs:
    """Return the chat endpoint's format: a list of objects."""
    return ChatLogprobs([_chat_token(tokenizer, token) for token in tokens])


def _chat_token(tokenizer: Tokenizer, token: ChoiceToken) -> ChatTokenLogprob:
    text, data = tokenizer.token_text(token.token_id)
    top = [
        TopLogprob(alternative.text, max(logprob, _LOWEST), list(alternative.bytes))
        for token_id, logprob in zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
        for alternative in [tokenizer.token_text(token_id)]
    ]
    return ChatTokenLogprob(text, max(token.logprobs.logprob, _LOWEST), list(data), top)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Iterable[tuple[int, TokenLogprobs | None, int]], num_top: int
) -> CompletionLogprobs:
    """Return the completions endpoint's format: parallel lists.

    Args:
        tokenizer: decodes the token ids.
        tokens: (id, log-probabilities or None for the first prompt token, offset in the returned text) of each token.
        num_top: number of requested alternatives.
    """
    out = CompletionLogprobs([], [], [], [])
    for token_id, logprobs, offset in tokens:
        text = tokenizer.token_text(token_id).text
        out.tokens.append(text)
        out.text_offset.append(offset)
        if logprobs is None:
            out.token_logprobs.append(None)
            out.top_logprobs.append(None)
            continue
        out.token_logprobs.append(max(logprobs.logprob, _LOWEST))
        top: dict[str, float] = {}
        for top_id, logprob in zip(logprobs.top_ids[:num_top], logprobs.top_logprobs, strict=False):
            # Tokens with the same text share a key; the likelier one comes first and is kept.
            top.setdefault(tokenizer.token_text(top_id).text, max(logprob, _LOWEST))
        top.setdefault(text, max(logprobs.logprob, _LOWEST))
        out.top_logprobs.append(top)
    return out
