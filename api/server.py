"""What the handlers share: the engine's client, the tokenizer, settings, metrics, and whether requests are taken."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.adapters.registry import AdapterRegistry
from api.metrics import Metrics
from api.requests.builder import Prepared, ServedModel
from api.requests.model_names import ModelNames
from api.responses.store import ResponseStore
from jaxserve.config import LoraConfig
from jaxserve.engine.client import EngineClient
from jaxserve.engine.output_processor import GenerationStream
from jaxserve.errors import RequestError, UnavailableError
from jaxserve.loading.generation_config import GenerationConfig
from jaxserve.parsing.message_parser import select_parsers
from jaxserve.structured.grammar import JsonStyle
from jaxserve.structured.validator import GrammarValidator
from jaxserve.text.completion_template import CompletionTemplate
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Settings of the HTTP side.

    Attributes:
        model_path: as the user gave it.
        served_model_name: what clients call the model.
        api_key: None leaves everything open.
        generation: sampling defaults, and end tokens.
        server_args: the launch flags, secrets left out, for `/get_server_info`.
        reasoning_parser: name of the reasoning format, `auto`, or None for none.
        tool_call_parser: name of the tool-call format, or `auto`.
        json_style: how constrained JSON may be laid out; None refuses all grammars.
        completion_template: for requests with a suffix; None refuses them.
        admin_api_key: the key of control routes; None leaves them to `api_key`.
        lora: adapters of the start and limits of later ones, with the paths as the user gave them; None without LoRA.
        lora_root: folder whose adapters may be loaded while serving.
        strict_params: refuse fields that are not known.
        log_requests: one log line per request.
        enable_metrics: serve `/metrics`.
    """

    model_path: str
    served_model_name: str
    api_key: str | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    server_args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    reasoning_parser: str | None = None
    tool_call_parser: str = "auto"
    json_style: JsonStyle | None = field(default_factory=JsonStyle)
    completion_template: CompletionTemplate | None = None
    admin_api_key: str | None = None
    lora: LoraConfig | None = None
    lora_root: str | None = None
    strict_params: bool = False
    log_requests: bool = False
    enable_metrics: bool = True


class Server:
    """State of one API process.

    Attributes:
        draining: set on the way down: no new requests.
        adapters: that requests can name.
        running: generations of what is being answered, by the id of the answer.
        responses: state of the Responses protocol.
    """

    def __init__(self, settings: ApiSettings, client: EngineClient) -> None:
        self.settings = settings
        self.client = client
        self.metrics = Metrics(client)
        self.draining = False
        self.created = int(time.time())
        self.running: dict[str, list[GenerationStream]] = {}
        self.responses = ResponseStore()
        reserved = ("default", settings.served_model_name, settings.model_path)
        root = None if settings.lora_root is None else Path(settings.lora_root)
        self.adapters = AdapterRegistry(client, settings.lora, root, reserved)
        self._model: ServedModel | None = None
        self._validator: GrammarValidator | None = None

    @property
    def model(self) -> ServedModel:
        """What requests are built for; raises UnavailableError until it is loaded."""
        if self._model is None:
            raise UnavailableError("the model is still loading")
        return self._model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UnavailableError until it is loaded."""
        return self.model.tokenizer

    def serve(self, tokenizer: Tokenizer) -> None:
        """Take requests from now on; the engine is ready.

        Raises:
            LaunchError: the settings name a format that is not known.
        """
        settings, info = self.settings, self.client.info
        self._model = ServedModel(
            tokenizer=tokenizer,
            info=info,
            generation=settings.generation,
            formats=select_parsers(settings.reasoning_parser, settings.tool_call_parser, tokenizer.chat_template),
            json_style=settings.json_style or JsonStyle(),
            completion_template=settings.completion_template,
            names=ModelNames(
                served=settings.served_model_name, path=settings.model_path, adapters=self.adapters.by_name
            ),
        )
        if settings.json_style is None and self._model.formats.reasoning is None:
            return  # nothing can be constrained
        for_grammars = tokenizer.for_grammars(info.vocab_size, self._model.eos_token_ids)
        self.client.use_tokenizer(for_grammars)
        self._validator = GrammarValidator(for_grammars)

    async def prepare_grammars(self) -> None:
        """Start what the first grammar would wait for."""
        if self._validator is not None and self.settings.json_style is not None:
            await self._validator.start()

    async def check_grammar(self, prepared: Prepared) -> None:
        """Raise RequestError unless the request's grammar, if it has one, can be used."""
        if not prepared.request.grammar:
            return
        if self.settings.json_style is None or self._validator is None:
            raise RequestError("grammars are switched off (--grammar-backend none)", param=prepared.grammar_param)
        await self._validator.check(prepared.request.grammar, prepared.grammar_param)

    def close(self) -> None:
        """End the processes of this object."""
        if self._validator is not None:
            self._validator.close()

    def check_accepting(self) -> None:
        """Raise UnavailableError unless a new request can be taken."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        self.client.check_ready()
        _ = self.model

    def check_model(self, name: str | None) -> str:
        """See `ModelNames.check`."""
        return self.model.names.check(name)
