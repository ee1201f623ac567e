"""What the handlers share: the engine's client, the tokenizer, settings, metrics, and whether requests are taken."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from api.metrics import Metrics
from jaxserve.client import EngineClient
from jaxserve.errors import NotFoundError, UnavailableError
from jaxserve.generation import Generation
from jaxserve.generation_config import GenerationConfig
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Settings of the HTTP side.

    Attributes:
        model_path: as the user gave it.
        served_model_name: what clients call the model.
        api_key: None leaves everything open.
        generation: sampling defaults of the chat endpoint, and end tokens.
        server_args: the launch flags, secrets left out, for `/get_server_info`.
        log_requests: one log line per request.
        enable_metrics: serve `/metrics`.
    """

    model_path: str
    served_model_name: str
    api_key: str | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    server_args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    log_requests: bool = False
    enable_metrics: bool = True


class Server:
    """State of one API process.

    Attributes:
        draining: set on the way down: no new requests.
        running: generations of what is being answered, by the id of the answer.
    """

    def __init__(self, settings: ApiSettings, client: EngineClient) -> None:
        self.settings = settings
        self.client = client
        self.metrics = Metrics(client)
        self.draining = False
        self.created = int(time.time())
        self.running: dict[str, list[Generation]] = {}
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UnavailableError until it is loaded."""
        if self._tokenizer is None:
            raise UnavailableError("the model is still loading")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def check_accepting(self) -> None:
        """Raise UnavailableError unless a new request can be taken."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        self.client.check_ready()
        _ = self.tokenizer

    def check_model(self, name: str | None) -> str:
        """Resolve the `model` field; unset and `default` mean the served one.

        Raises:
            NotFoundError: another model is asked for.
        """
        served = self.settings.served_model_name
        if name in (None, "", "default", served, self.settings.model_path):
            return name or served
        raise NotFoundError(
            f"the model {name!r} does not exist; served: {served}", param="model", code="model_not_found"
        )
