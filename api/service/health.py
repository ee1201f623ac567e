"""Health checks and metrics."""

import asyncio
import uuid

from litestar import MediaType, Response, get
from litestar.di import NamedDependency

from api.auth import OPEN
from api.openapi import errors
from api.server import Server
from jaxserve.engine.output_processor import GenerationStream, TextOptions
from jaxserve.errors import NotFoundError, UnavailableError
from jaxserve.request import FinishReason, Request
from jaxserve.sampling_params import SamplingParams

_HEALTH_LIMIT_S = 20.0


@get("/live", opt=OPEN, summary="Liveness check")
async def live() -> Response[None]:
    """Return 200 as long as the API process responds."""
    return Response(None, status_code=200)


@get(["/health", "/ready"], opt=OPEN, summary="Readiness check", responses=errors())
async def health(server: NamedDependency[Server]) -> Response[None]:
    """Return 200 if requests are accepted, and 503 while loading or draining or if the engine is lost."""
    server.check_accepting()
    return Response(None, status_code=200)


@get("/health_generate", opt=OPEN, summary="Generation health check", responses=errors())
async def health_generate(server: NamedDependency[Server]) -> Response[None]:
    """Generate one token; returns 503 if that takes longer than 20 s."""
    server.check_accepting()
    request = Request(
        id=f"health-{uuid.uuid4().hex}", prompt_token_ids=(0,), sampling=SamplingParams(temperature=0, max_tokens=1)
    )
    generation = GenerationStream(server.client, server.tokenizer, request, TextOptions())
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
    """Return the metrics in Prometheus' text format."""
    if not server.settings.enable_metrics:
        raise NotFoundError("metrics are switched off (--no-enable-metrics)")
    return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
