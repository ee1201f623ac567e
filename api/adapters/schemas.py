"""Request and response bodies of the adapter routes."""

import msgspec


class LoadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /load_lora_adapter`; `lora_path` is a folder below `--lora-root`."""

    lora_name: str
    lora_path: str
    pinned: bool = False


class UnloadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /unload_lora_adapter`."""

    lora_name: str


class AdapterAnswer(msgspec.Struct):
    """Response body of both routes: the error, if any, and the paths of all loaded adapters by name."""

    success: bool
    error_message: str | None
    loaded_adapters: dict[str, str]
