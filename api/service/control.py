"""Control routes: flushing the cache and aborting requests."""

from litestar import post
from litestar.di import NamedDependency
from litestar.params import JSONBody

from api.auth import CONTROL
from api.openapi import errors
from api.server import Server
from api.service.schemas import AbortBody, FlushResponse
from jaxserve.errors import RequestError


@post("/flush_cache", status_code=200, opt=CONTROL, summary="Flush the prefix cache", responses=errors(403, body=True))
async def flush_cache(server: NamedDependency[Server]) -> FlushResponse:
    """Empty the prefix cache; returns 400 while requests run."""
    if not await server.client.flush_cache():
        raise RequestError("the cache cannot be flushed while requests run")
    return FlushResponse(flushed=True)


@post("/abort_request", status_code=200, opt=CONTROL, summary="Abort requests", responses=errors(403, body=True))
async def abort_request(data: JSONBody[AbortBody], server: NamedDependency[Server]) -> dict[str, int]:
    """Abort the requests whose response id starts with `rid`, or all."""
    if not data.rid and not data.abort_all:
        raise RequestError("give rid or abort_all", param="rid")
    names = [name for name in server.running if data.abort_all or name.startswith(data.rid)]
    for name in names:
        for generation in server.running[name]:
            server.client.abort(generation.request.id)
    return {"aborted": len(names)}
