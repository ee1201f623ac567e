"""jaxserve: an OpenAI-compatible inference server for open models, in JAX.

`LLM` and `SamplingParams` are the offline interface; they are imported on first use, because `LLM` imports jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.engine.output_processor import TextOptions
    from jaxserve.llm import LLM
    from jaxserve.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams", "TextOptions"]


_LAZY_IMPORTS = {
    "LLM": "jaxserve.llm",
    "SamplingParams": "jaxserve.sampling_params",
    "TextOptions": "jaxserve.engine.output_processor",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)
