"""Llama 1 to 3 and models with the same layers: SmolLM2, the DeepSeek-R1 Llama distillations."""

from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config

ARCHITECTURE = Architecture(read_config=read_dense_config, tensor_names=dense_tensor_names, build=build_decoder)
