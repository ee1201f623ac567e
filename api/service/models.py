"""Model cards of the served model and its adapters."""

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath

from api.openapi import errors
from api.server import Server
from api.service.schemas import ModelCard, ModelList
from jaxserve.errors import NotFoundError


def _cards(server: Server) -> list[ModelCard]:
    """Return the cards of the model and its adapters."""
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
    """List the served model and its adapters."""
    return ModelList(_cards(server))


@get("/v1/models/{model_id:path}", summary="One model", responses=errors(404))
async def get_model(model_id: FromPath[str], server: NamedDependency[Server]) -> ModelCard:
    """Return one model card, or 404 if the model is not served."""
    name = model_id.removeprefix("/")
    for card in _cards(server):
        if name == card.id.removeprefix("/"):
            return card
    raise NotFoundError(f"the model {name!r} does not exist", param="model", code="model_not_found")
