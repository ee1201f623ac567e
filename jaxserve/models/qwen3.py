"""Qwen3 dense: queries and keys are normalised per head before rotation."""

from functools import partial

from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf_config import read_dense_config

ARCHITECTURE = Architecture(
    read_config=partial(read_dense_config, qk_norm="head"),
    tensor_names=dense_tensor_names,
    build=build_decoder,
)
