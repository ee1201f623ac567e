"""State shared by the handlers: engine client, tokenizer, settings, metrics, and whether requests are accepted."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from api.adapters.registry import AdapterRegistry
from api.metrics import Metrics
from api.requests.builder import Prepared, RequestBuilder, SeedSource, ServedModel
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
    """Settings of the HTTP server.

    Attributes:
        model_path: the model's path as the user gave it.
        served_model_name: name by which clients refer to the model.
        api_key: key that clients must send; None leaves all routes open.
        generation: sampling defaults, and additional end tokens.
        server_args: launch flags without secrets, for `/get_server_info`.
        reasoning_parser: name of the reasoning format, `auto`, or None for no parser.
        tool_call_parser: name of the tool-call format, or `auto`.
        json_style: whitespace rules for constrained JSON; None refuses all grammars.
        completion_template: template of requests with a suffix; None refuses them.
        admin_api_key: key of the control routes; None means that they use `api_key`.
        lora: adapters given at startup, with the user's paths, and limits for later ones; None without LoRA.
        lora_root: folder from which adapters may be loaded at runtime.
        strict_params: refuse unknown fields.
        log_requests: log one line per request.
        enable_metrics: serve `/metrics`.
        random_seed: makes the seeds of requests without a seed reproducible.
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
    random_seed: int | None = None


class ReadyState(NamedTuple):
    """The state that exists once the engine is ready.

    Attributes:
        builder: builds engine requests.
        validator: validates grammars; None if no request can be constrained.
    """

    builder: RequestBuilder
    validator: GrammarValidator | None


class Server:
    """State of one API process.

    Attributes:
        draining: set during shutdown, when new requests are refused.
        adapters: adapters that requests can name.
        running: generations of each running request, by response id.
        responses: stored responses of the Responses protocol.
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
        self._ready: ReadyState | None = None

    @property
    def ready(self) -> ReadyState:
        """The state that exists once the engine is ready; raises UnavailableError before."""
        if self._ready is None:
            raise UnavailableError("the model is still loading")
        return self._ready

    @property
    def model(self) -> ServedModel:
        """The served model; raises UnavailableError until the engine is ready."""
        return self.ready.builder.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UnavailableError until the engine is ready."""
        return self.model.tokenizer

    def builder(self) -> RequestBuilder:
        """The request builder; raises UnavailableError unless a new request can be taken."""
        self.check_accepting()
        return self.ready.builder

    def serve(self, tokenizer: Tokenizer) -> None:
        """Start accepting requests; the engine must be ready.

        Raises:
            LaunchError: the settings name an unknown reasoning or tool-call format.
        """
        settings, info = self.settings, self.client.info
        model = ServedModel(
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
        builder, validator = RequestBuilder(model, SeedSource(settings.random_seed)), None
        # A thinking budget is a constraint too.
        if settings.json_style is not None or model.formats.reasoning is not None:
            for_grammars = tokenizer.for_grammars(info.vocab_size, model.eos_token_ids)
            self.client.use_tokenizer(for_grammars)
            validator = GrammarValidator(for_grammars)
        self._ready = ReadyState(builder, validator)

    async def prepare_grammars(self) -> None:
        """Start the grammar validator's process, so that the first grammar does not wait for it."""
        validator = self.ready.validator
        if validator is not None and self.settings.json_style is not None:
            await validator.start()

    async def check_grammar(self, prepared: Prepared) -> None:
        """Raise RequestError if the request has a grammar that cannot be used."""
        if not prepared.request.grammar:
            return
        validator = self.ready.validator
        if self.settings.json_style is None or validator is None:
            raise RequestError("grammars are switched off (--grammar-backend none)", param=prepared.grammar_param)
        await validator.check(prepared.request.grammar, prepared.grammar_param)

    def close(self) -> None:
        """Stop the grammar validator's processes."""
        if self._ready is not None and self._ready.validator is not None:
            self._ready.validator.close()

    def check_accepting(self) -> None:
        """Raise UnavailableError unless new requests are accepted."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        self.client.check_ready()
        _ = self.ready
