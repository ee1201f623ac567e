"""What clients may call the model, and which LoRA adapter they mean by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api.adapters.registry import NamedAdapter
from jaxserve.errors import NotFoundError, RequestError


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """Names of one model and its adapters.

    Attributes:
        served: the model's.
        path: where it came from, which is a name for it, too.
        adapters: that are loaded, by name; None where the server runs without LoRA.
    """

    served: str
    path: str
    adapters: Mapping[str, NamedAdapter] | None

    def adapter(self, model: str | None, lora_path: str | Sequence[str | None] | None) -> str:
        """The key of the adapter of a request with one prompt, empty for none; see `adapters_for`."""
        if lora_path is not None and not isinstance(lora_path, str):
            raise RequestError("lora_path must be one adapter's name here", param="lora_path")
        [adapter] = self.adapters_for(model, lora_path, 1)
        return adapter

    def adapters_for(
        self, model: str | None, lora_path: str | Sequence[str | None] | None, num_prompts: int
    ) -> list[str]:
        """The key of each prompt's adapter, empty for none.

        Args:
            model: `base:adapter` or an adapter's name wins over `lora_path`.
            lora_path: an adapter's name for all prompts, or one for each; null or empty is the base model.
            num_prompts: how many there are.

        Raises:
            NotFoundError: no such model or adapter.
            RequestError: the server runs without LoRA, or there are not as many names as prompts.
        """
        if adapter := self._of_model(model):
            return [adapter] * num_prompts
        names = [lora_path] * num_prompts if lora_path is None or isinstance(lora_path, str) else list(lora_path)
        if len(names) != num_prompts:
            raise RequestError(f"lora_path has {len(names)} entries for {num_prompts} prompts", param="lora_path")
        return [self._loaded(name.strip(), "lora_path") if name else "" for name in names]

    def check(self, model: str | None) -> str:
        """The name to answer with; unset and `default` mean the served model.

        Raises:
            NotFoundError: no such model or adapter.
            RequestError: the server runs without LoRA.
        """
        self._of_model(model)
        return model or self.served

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
