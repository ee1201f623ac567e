"""Routes that load and unload LoRA adapters, compatible with SGLang's."""

from collections.abc import Coroutine
from typing import Any

from litestar import Response, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody

from api.adapters.schemas import AdapterAnswer, LoadAdapterBody, UnloadAdapterBody
from api.auth import CONTROL
from api.errors import to_response
from api.openapi import errors
from api.requests.schemas import ErrorBody
from api.server import Server
from jaxserve.errors import AdapterError

_ERRORS = errors(403, body=True) | {400: ResponseSpec(AdapterAnswer | ErrorBody, generate_examples=False)}


@post(
    ["/load_lora_adapter", "/v1/load_lora_adapter"],
    status_code=200,
    opt=CONTROL,
    summary="Load a LoRA adapter",
    responses=_ERRORS,
)
async def load_lora_adapter(
    data: JSONBody[LoadAdapterBody], server: NamedDependency[Server]
) -> Response[AdapterAnswer]:
    """Return 200 once requests can name the adapter; if it cannot be loaded, 400 with the reason and no change."""
    server.check_accepting()
    return await _answer(server, server.adapters.load(data.lora_name, data.lora_path, pinned=data.pinned))


@post(
    ["/unload_lora_adapter", "/v1/unload_lora_adapter"],
    status_code=200,
    opt=CONTROL,
    summary="Unload a LoRA adapter",
    responses=_ERRORS,
)
async def unload_lora_adapter(
    data: JSONBody[UnloadAdapterBody], server: NamedDependency[Server]
) -> Response[AdapterAnswer]:
    """Hide the adapter from new requests immediately and return once those that use it have ended.

    Returns 400 if the adapter is not loaded.
    """
    server.check_accepting()
    return await _answer(server, server.adapters.unload(data.lora_name))


async def _answer(server: Server, change: Coroutine[Any, Any, None]) -> Response[AdapterAnswer]:
    error: AdapterError | None = None
    try:
        await change
    except AdapterError as refused:
        error = refused
    paths = {name: adapter.path for name, adapter in (server.adapters.by_name or {}).items()}
    body = AdapterAnswer(error is None, None if error is None else str(error), paths)
    return Response(body, status_code=200 if error is None else to_response(error).status_code)
