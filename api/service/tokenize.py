"""Routes that convert text to token ids and back."""

from typing import Any

from litestar import Request as HttpRequest
from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from api.chat.build import tokenize as tokenize_prompt
from api.openapi import errors
from api.requests.builder import RequestBuilder, build
from api.requests.fields import check_fields
from api.server import Server
from api.service.schemas import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from jaxserve.errors import RequestError


@post(["/tokenize", "/v1/tokenize"], status_code=200, summary="Text to token ids", responses=errors(404, body=True))
async def tokenize(
    data: JSONBody[TokenizeRequest],
    server: NamedDependency[Server],
    builder: NamedDependency[RequestBuilder],
    request: HttpRequest[Any, Any, Any],
) -> TokenizeResponse:
    """Tokenize a prompt, or messages rendered with the chat template."""
    check_fields(await request.json(), TokenizeRequest, strict=server.settings.strict_params)
    server.model.names.resolve(data.model)
    tokens = await build(len(await request.body()), tokenize_prompt, builder, data)
    return TokenizeResponse(tokens, len(tokens), server.client.info.context_length)


@post(["/detokenize", "/v1/detokenize"], status_code=200, summary="Token ids to text", responses=errors(404, body=True))
async def detokenize(data: JSONBody[DetokenizeRequest], server: NamedDependency[Server]) -> DetokenizeResponse:
    """Decode token ids."""
    server.model.names.resolve(data.model)
    vocab_size, limit = server.client.info.vocab_size, server.client.info.context_length
    if len(data.tokens) > limit:
        raise RequestError(f"tokens: {len(data.tokens)} ids, the limit is {limit}", param="tokens")
    for token_id in data.tokens:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"tokens: id {token_id} is outside the vocabulary of {vocab_size}", param="tokens")
    return DetokenizeResponse(server.tokenizer.decode(data.tokens, skip_special_tokens=data.skip_special_tokens))
