"""Messages between the API process and the engine process: msgspec structs, sent as MessagePack over a socket."""

from typing import Any, TypeAlias

import msgspec

from jaxserve.request import AdapterSource, GrammarTokenizer, Request, TokenDelta


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Information about the loaded model for the API process.

    Attributes:
        context_length: maximum number of prompt and output tokens of a request; never more than the page pool holds.
        eos_token_ids: the model's end tokens.
        max_rows: maximum number of choices that run at the same time.
        device: number and kind of the devices, as readable text.
        adapters: keys of the LoRA adapters that were loaded at the start; None without LoRA.
    """

    architecture: str
    vocab_size: int
    context_length: int
    max_rows: int
    page_size: int
    num_pages: int
    dtype: str
    device: str
    eos_token_ids: tuple[int, ...]
    adapters: tuple[str, ...] | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and counters of the engine, sent with the deltas."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_used_pages: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_compiles: int = 0
    num_compiles_after_ready: int = 0


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a request."""

    request: Request


class UseTokenizer(msgspec.Struct, frozen=True, tag=True):
    """Accept constrained requests from now on."""

    tokenizer: GrammarTokenizer


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request, or one choice of it; ignored if it has already ended."""

    request_id: str
    choice: int | None = None


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Forget cached prefixes; answered by `CacheFlushed`."""


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Load a LoRA adapter; answered by `AdapterAnswer`."""

    source: AdapterSource


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Unload a LoRA adapter after its last request; answered by `AdapterAnswer`."""

    key: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the step loop and exit with code 0."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine accepts requests from now on."""

    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start; `error` is a message for the user."""

    error: str


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """The output of a step."""

    deltas: list[TokenDelta]
    stats: EngineStats


class CacheFlushed(msgspec.Struct, frozen=True, tag=True):
    """Answer to `FlushCache`; `flushed` is False while requests run."""

    flushed: bool


class AdapterAnswer(msgspec.Struct, frozen=True, tag=True):
    """Answer to `LoadAdapter` and `UnloadAdapter`; `error` is None on success."""

    key: str
    error: str | None


ToEngine: TypeAlias = UseTokenizer | Submit | Abort | FlushCache | LoadAdapter | UnloadAdapter | Shutdown
Reply: TypeAlias = CacheFlushed | AdapterAnswer
FromEngine: TypeAlias = Ready | StartFailed | Deltas | Reply

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """Encode a message."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Decode a message to the engine."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Decode a message from the engine."""
    return _from_engine.decode(data)
