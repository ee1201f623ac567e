"""Log-probabilities in the two shapes of the protocol."""

from collections.abc import Iterable, Sequence

from api.requests.schemas import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from jaxserve.engine.output_processor import ChoiceToken
from jaxserve.request import TokenLogprobs
from jaxserve.text.tokenizer import Tokenizer

# JSON has no -inf; a forbidden token's log-probability is shown as OpenAI shows it.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ChoiceToken]) -> ChatLogprobs:
    """Chat endpoint: a list of objects."""
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
    """Completions endpoint: parallel lists.

    Args:
        tokenizer: to name the tokens.
        tokens: (id, log-probabilities or None for the first prompt token, offset in the returned text).
        num_top: alternatives that were asked for.
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
            # Tokens that read alike share a key; the likelier one comes first and stays.
            top.setdefault(tokenizer.token_text(top_id).text, max(logprob, _LOWEST))
        top.setdefault(text, max(logprobs.logprob, _LOWEST))
        out.top_logprobs.append(top)
    return out
