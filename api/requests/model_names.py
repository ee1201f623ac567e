"""Resolves the names by which requests select the model and its LoRA adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from api.adapters.registry import NamedAdapter
from jaxserve.errors import NotFoundError, RequestError


class ResolvedModel(NamedTuple):
    """The model that a request names.

    Attributes:
        name: name of the model in the response.
        adapter_keys: the key of each prompt's adapter; empty for the base model.
    """

    name: str
    adapter_keys: list[str]


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """Names of one model and its adapters.

    Attributes:
        served: the served model name.
        path: the model's path, which is accepted as a name as well.
        adapters: loaded adapters by name; None if the server runs without LoRA.
    """

    served: str
    path: str
    adapters: Mapping[str, NamedAdapter] | None

    def resolve(
        self, model: str | None, lora_path: str | Sequence[str | None] | None = None, *, num_prompts: int = 1
    ) -> ResolvedModel:
        """Resolve the names in a request.

        Args:
            model: `base:adapter` or an adapter's name wins over `lora_path`; unset and `default` mean the served model.
            lora_path: an adapter's name for all prompts, or one per prompt; null or empty means the base model.
            num_prompts: number of prompts of the request.

        Raises:
            NotFoundError: no such model or adapter.
            RequestError: the server runs without LoRA, or the number of names is not `num_prompts`.
        """
        return ResolvedModel(model or self.served, self._adapter_keys(model, lora_path, num_prompts))

    def _adapter_keys(
        self, model: str | None, lora_path: str | Sequence[str | None] | None, num_prompts: int
    ) -> list[str]:
        if key := self._of_model(model):
            return [key] * num_prompts
        names = [lora_path] * num_prompts if lora_path is None or isinstance(lora_path, str) else list(lora_path)
        if len(names) != num_prompts:
            raise RequestError(f"lora_path has {len(names)} entries for {num_prompts} prompts", param="lora_path")
        return [self._loaded(name.strip(), "lora_path") if name else "" for name in names]

    def _of_model(self, model: str | None) -> str:
        if self._is_base(model):
            return ""
        assert model is not None
        if self.adapters is not None and model in self.adapters:
            return self.adapters[model].key
        base, separator, adapter = (part.strip() for part in model.partition(":"))
        if separator and self._is_base(base):
            return self._loaded(adapter, "model") if adapter else ""
        others = f"; adapters: {', '.join(self.adapters)}" if self.adapters else ""
        raise NotFoundError(
            f"the model {model!r} does not exist; served: {self.served}{others}", param="model", code="model_not_found"
        )

    def _is_base(self, name: str | None) -> bool:
        return name in (None, "", "default", self.served, self.path)

    def _loaded(self, adapter: str, param: str) -> str:
        if self.adapters is None:
            raise RequestError(
                f"the adapter {adapter!r} needs a server with --enable-lora or --lora-paths", param=param
            )
        if adapter not in self.adapters:
            raise NotFoundError(
                f"the adapter {adapter!r} does not exist; loaded: {', '.join(self.adapters) or 'none'}",
                param=param,
                code="adapter_not_found",
            )
        return self.adapters[adapter].key
