"""Mistral 7B and its successors: Llama's layers without biases, and an optional sliding window."""

from functools import partial

from jaxserve.models.architecture import Architecture, build_decoder
from jaxserve.models.decoder import dense_tensor_names
from jaxserve.models.hf.config import read_dense_config

ARCHITECTURE = Architecture(
    read_config=partial(read_dense_config, attention_bias=False, attention_out_bias=False),
    tensor_names=dense_tensor_names,
    build=build_decoder,
)
