"""Bodies and answers of the adapter routes."""

import msgspec


class LoadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /load_lora_adapter`; the path is below `--lora-root`."""

    lora_name: str
    lora_path: str
    pinned: bool = False


class UnloadAdapterBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /unload_lora_adapter`."""

    lora_name: str


class AdapterAnswer(msgspec.Struct):
    """Answer to both: what was wrong, if anything, and the paths of what is loaded now, by name."""

    success: bool
    error_message: str | None
    loaded_adapters: dict[str, str]
