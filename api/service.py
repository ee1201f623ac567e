"""Routes beside generation: models, health, metrics, tokenizer, information, control."""

import asyncio
import uuid
from typing import Any

import msgspec
from litestar import MediaType, Response, get, post
from litestar import Request as HttpRequest
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from api.auth import CONTROL, OPEN
from api.chat_params import tokenize as tokenize_prompt
from api.fields import check_fields
from api.openapi import errors
from api.params import RequestBuilder, build
from api.schemas import (
    AbortBody,
    DetokenizeRequest,
    DetokenizeResponse,
    FlushResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from api.server import Server
from jaxserve.engine.output_processor import Generation, TextOptions
from jaxserve.errors import NotFoundError, RequestError, UnavailableError
from jaxserve.request import FinishReason, Request, SamplingParams

_HEALTH_LIMIT_S = 20.0


def _cards(server: Server) -> list[ModelCard]:
    """The model, and its adapters."""
    settings = server.settings
    base = ModelCard(
        id=settings.served_model_name,
        created=server.created,
        max_model_len=server.client.info.context_length,
        root=settings.model_path,
    )
    adapters = [
        msgspec.structs.replace(base, id=name, root=adapter.path, parent=base.id)
        for name, adapter in (server.adapters.by_name or {}).items()
    ]
    return [base, *adapters]


@get("/v1/models", summary="Served models", responses=errors())
async def list_models(server: NamedDependency[Server]) -> ModelList:
    """Cards of what is served."""
    return ModelList(_cards(server))


@get("/v1/models/{model_id:path}", summary="One model", responses=errors(404))
async def get_model(model_id: FromPath[str], server: NamedDependency[Server]) -> ModelCard:
    """One card; 404 for what is not served."""
    name = model_id.removeprefix("/")
    for card in _cards(server):
        if name == card.id.removeprefix("/"):
            return card
    raise NotFoundError(f"the model {name!r} does not exist", param="model", code="model_not_found")


@get("/live", opt=OPEN, summary="The process runs")
async def live() -> Response[None]:
    """200 as long as the API process answers."""
    return Response(None, status_code=200)


@get(["/health", "/ready"], opt=OPEN, summary="The server takes requests", responses=errors())
async def health(server: NamedDependency[Server]) -> Response[None]:
    """200 when requests are served; 503 while loading, draining or without an engine."""
    server.check_accepting()
    return Response(None, status_code=200)


@get("/health_generate", opt=OPEN, summary="The engine generates", responses=errors())
async def health_generate(server: NamedDependency[Server]) -> Response[None]:
    """Generate one token; 503 when that takes longer than 20 s."""
    server.check_accepting()
    request = Request(
        id=f"health-{uuid.uuid4().hex}", prompt_token_ids=(0,), sampling=SamplingParams(temperature=0, max_tokens=1)
    )
    generation = Generation(server.client, server.tokenizer, request, TextOptions())
    try:
        async with asyncio.timeout(_HEALTH_LIMIT_S):
            async for delta in generation.deltas():
                if delta.finish_reason is FinishReason.ERROR:
                    raise UnavailableError(delta.error or "the engine failed")
    except TimeoutError:
        raise UnavailableError(f"no token within {_HEALTH_LIMIT_S:.0f} s") from None
    finally:
        generation.close()
    return Response(None, status_code=200)


@get("/metrics", opt=OPEN, media_type=MediaType.TEXT, summary="Prometheus metrics", responses=errors(404))
async def metrics(server: NamedDependency[Server]) -> Response[bytes]:
    """The text format."""
    if not server.settings.enable_metrics:
        raise NotFoundError("metrics are switched off (--no-enable-metrics)")
    return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@post(["/tokenize", "/v1/tokenize"], status_code=200, summary="Text to token ids", responses=errors(404, body=True))
async def tokenize(
    data: JSONBody[TokenizeRequest],
    server: NamedDependency[Server],
    builder: NamedDependency[RequestBuilder],
    request: HttpRequest[Any, Any, Any],
) -> TokenizeResponse:
    """Tokenize a prompt, or messages through the chat template."""
    check_fields(await request.json(), TokenizeRequest, strict=server.settings.strict_params)
    server.check_model(data.model)
    tokens = await build(len(await request.body()), tokenize_prompt, builder, data)
    return TokenizeResponse(tokens, len(tokens), server.client.info.context_length)


@post(["/detokenize", "/v1/detokenize"], status_code=200, summary="Token ids to text", responses=errors(404, body=True))
async def detokenize(data: JSONBody[DetokenizeRequest], server: NamedDependency[Server]) -> DetokenizeResponse:
    """Decode token ids."""
    server.check_model(data.model)
    vocab_size, limit = server.client.info.vocab_size, server.client.info.context_length
    if len(data.tokens) > limit:
        raise RequestError(f"tokens: {len(data.tokens)} ids, the limit is {limit}", param="tokens")
    for token_id in data.tokens:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"tokens: id {token_id} is outside the vocabulary of {vocab_size}", param="tokens")
    return DetokenizeResponse(server.tokenizer.decode(data.tokens, skip_special_tokens=data.skip_special_tokens))


@get(["/get_model_info", "/model_info"], summary="What is served", responses=errors())
async def model_info(server: NamedDependency[Server]) -> dict[str, Any]:
    """SGLang's model information."""
    info = server.client.info
    return {
        "model_path": server.settings.model_path,
        "served_model_name": server.settings.served_model_name,
        "is_generation": True,
        "architectures": [info.architecture],
        "context_length": info.context_length,
        "vocab_size": info.vocab_size,
        "dtype": info.dtype,
    }


@get(["/get_server_info", "/server_info"], summary="How it is served", responses=errors())
async def server_info(server: NamedDependency[Server]) -> dict[str, Any]:
    """Launch flags and the engine's sizes."""
    info, stats = server.client.info, server.client.stats
    return {
        **server.settings.server_args,
        "device": info.device,
        "max_running_requests": info.max_rows,
        "page_size": info.page_size,
        "max_total_num_tokens": info.page_size * info.num_pages,
        "num_running_requests": stats.num_running,
        "num_queued_requests": stats.num_waiting,
        "num_compiles_after_ready": stats.num_compiles_after_ready,
    }


@post("/flush_cache", status_code=200, opt=CONTROL, summary="Forget cached prefixes", responses=errors(403, body=True))
async def flush_cache(server: NamedDependency[Server]) -> FlushResponse:
    """Empty the prefix cache; 400 while requests run."""
    if not await server.client.flush_cache():
        raise RequestError("the cache cannot be flushed while requests run")
    return FlushResponse(flushed=True)


@post("/abort_request", status_code=200, opt=CONTROL, summary="End running requests", responses=errors(403, body=True))
async def abort_request(data: JSONBody[AbortBody], server: NamedDependency[Server]) -> dict[str, int]:
    """Abort by the id of an answer, by the start of such ids, or all."""
    if not data.rid and not data.abort_all:
        raise RequestError("give rid or abort_all", param="rid")
    names = [name for name in server.running if data.abort_all or name.startswith(data.rid)]
    for name in names:
        for generation in server.running[name]:
            server.client.abort(generation.request.id)
    return {"aborted": len(names)}
