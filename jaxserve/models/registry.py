"""Architectures by Hugging Face class name. A new model needs a new file and one line here.

Modules are imported on demand, so the launcher can refuse an unknown architecture without importing jax.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.errors import LaunchError

if TYPE_CHECKING:
    from jaxserve.models.architecture import Architecture

_MODULES: Mapping[str, str] = {
    "DeepseekV2ForCausalLM": "jaxserve.models.deepseek_v2",
    "DeepseekV3ForCausalLM": "jaxserve.models.deepseek_v3",
    "Gemma3ForCausalLM": "jaxserve.models.gemma3",
    "GptOssForCausalLM": "jaxserve.models.gpt_oss",
    "LlamaForCausalLM": "jaxserve.models.llama",
    "MistralForCausalLM": "jaxserve.models.mistral",
    "MixtralForCausalLM": "jaxserve.models.mixtral",
    "Olmo2ForCausalLM": "jaxserve.models.olmo2",
    "Phi3ForCausalLM": "jaxserve.models.phi3",
    "Qwen2ForCausalLM": "jaxserve.models.qwen2",
    "Qwen2MoeForCausalLM": "jaxserve.models.qwen2_moe",
    "Qwen3ForCausalLM": "jaxserve.models.qwen3",
    "Qwen3MoeForCausalLM": "jaxserve.models.qwen3_moe",
    "SmolLM3ForCausalLM": "jaxserve.models.smollm3",
}


def architecture_name(hf_config: Mapping[str, Any]) -> str:
    """Return the supported architecture that a `config.json` names.

    Raises:
        LaunchError: the file names no supported architecture; the message lists those that are.
    """
    names = hf_config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in _MODULES:
        return names[0]
    raise LaunchError(f"architecture {names!r} is not supported; supported: {', '.join(sorted(_MODULES))}")


def find_architecture(hf_config: Mapping[str, Any]) -> "Architecture":
    """Import the architecture that a `config.json` names; raises like `architecture_name`."""
    return importlib.import_module(_MODULES[architecture_name(hf_config)]).ARCHITECTURE
