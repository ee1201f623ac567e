"""Architectures by their Hugging Face class name. A new model is a new file and one line here."""

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import LaunchError
from jaxserve.models.architecture import Architecture
from jaxserve.models.llama import LLAMA
from jaxserve.models.mistral import MISTRAL
from jaxserve.models.qwen2 import QWEN2
from jaxserve.models.qwen3 import QWEN3

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}


def find_architecture(hf_config: Mapping[str, Any]) -> Architecture:
    """Look up the architecture a `config.json` names.

    Raises:
        LaunchError: it is not supported; the message lists what is.
    """
    names = hf_config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise LaunchError(f"architecture {names!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
