"""The Litestar application: routes, guard, limits and exception handlers."""

from typing import Any

from litestar import Litestar, Request, Response, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from api.adapters import routes as adapters
from api.auth import KeyGuard
from api.chat import routes as chat
from api.completions import routes as completions
from api.errors import error_response, handle
from api.messages import routes as messages
from api.responses import routes as responses
from api.server import Server
from api.service import control, health, info, models, parsers, tokenize
from api.streaming import ClientGone

_MAX_BODY_BYTES = 8 << 20

ROUTES = (
    chat.chat_completions,
    completions.completions,
    responses.create_response,
    responses.retrieve_response,
    responses.cancel_response,
    responses.delete_response,
    messages.messages,
    messages.count_tokens,
    parsers.separate_reasoning,
    parsers.parse_function_call,
    models.list_models,
    models.get_model,
    health.live,
    health.health,
    health.health_generate,
    health.metrics,
    tokenize.tokenize,
    tokenize.detokenize,
    info.model_info,
    info.server_info,
    control.flush_cache,
    control.abort_request,
    adapters.load_lora_adapter,
    adapters.unload_lora_adapter,
)


def create_app(server: Server) -> Litestar:
    """Build the application around a server's shared state."""
    guard = KeyGuard(server.settings.api_key, server.settings.admin_api_key)
    return Litestar(
        route_handlers=ROUTES,
        dependencies={
            "server": Provide(lambda: server, sync_to_thread=False),
            "builder": Provide(server.builder, sync_to_thread=False),
        },
        guards=[guard],
        before_request=_check_content_type,
        request_max_body_size=_MAX_BODY_BYTES,
        exception_handlers={
            HTTPException: handle,
            ClientGone: lambda *_: Response(None, status_code=499),
            Exception: handle,
        },
        openapi_config=OpenAPIConfig(
            title="jaxserve",
            version="1",
            path="/schema",
            render_plugins=[JsonRenderPlugin()],
            openapi_router=Router("/schema", route_handlers=[], guards=[guard]),
        ),
        cors_config=CORSConfig(allow_origins=[]),
        # The launcher has configured logging.
        logging_config=None,
        debug=False,
    )


async def _check_content_type(request: Request[Any, Any, Any]) -> Response[Any] | None:
    # A web page can post text/plain to a loopback server without a CORS preflight, but not JSON.
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    if request.method == "POST" and has_body and request.content_type[0] != "application/json":
        return error_response(415, f"the body must be application/json, got {request.content_type[0] or 'nothing'!r}")
    return None
