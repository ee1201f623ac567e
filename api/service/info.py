"""Information about the served model and the server."""

from typing import Any

from litestar import get
from litestar.di import NamedDependency

from api.openapi import errors
from api.server import Server


@get(["/get_model_info", "/model_info"], summary="Model information", responses=errors())
async def model_info(server: NamedDependency[Server]) -> dict[str, Any]:
    """Return SGLang's model information."""
    info = server.client.info
    return {
        "model_path": server.settings.model_path,
        "served_model_name": server.settings.served_model_name,
        "is_generation": True,
        "architectures": [info.architecture],
        "context_length": info.context_length,
        "vocab_size": info.vocab_size,
        "dtype": info.dtype,
        "preferred_sampling_params": dict(server.settings.generation.sampling),
    }


@get(["/get_server_info", "/server_info"], summary="Server information", responses=errors())
async def server_info(server: NamedDependency[Server]) -> dict[str, Any]:
    """Return the launch flags, and the engine's sizes and statistics."""
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
