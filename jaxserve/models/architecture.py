"""The interface of an architecture, which is all that the engine knows of a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxserve.config import ModelConfig
from jaxserve.layers.args import DecoderArgs
from jaxserve.models.decoder import BuildLayer, Decoder, DecoderLayer
from jaxserve.models.hf.quantization import with_quantized_parts
from jaxserve.models.hf.tensor_name import TensorName
from jaxserve.models.param_spec import Path


class Architecture(NamedTuple):
    """One entry of the registry.

    Attributes:
        read_config: converts a parsed `config.json`.
        tensor_names: returns the checkpoint tensor of each weight, by the weight's path in the tree.
        build: builds the model.
    """

    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    tensor_names: Callable[[ModelConfig], dict[Path, TensorName]]
    build: Callable[[DecoderArgs], Decoder]

    def model_config(self, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Read `config.json`, including which modules are quantised.

        Raises:
            LaunchError: the file requests an unsupported feature.
        """
        config = self.read_config(hf_config)
        return with_quantized_parts(config, self.tensor_names(config))


def build_decoder(args: DecoderArgs, *, build_layer: BuildLayer = DecoderLayer) -> Decoder:
    """Build a decoder whose layers are made by `build_layer`."""
    return Decoder(args, build_layer=build_layer)
