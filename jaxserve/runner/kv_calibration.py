"""Calibrates the scales of an int8 KV cache on random tokens.

The model runs prompts of random tokens with a cache in the activations' dtype, and the scales follow from the largest
values in it. The magnitudes of a head's channels depend on the model more than on the text. Clipping costs more than a
bit of resolution, so the scales cover one and a half times the measured values.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.errors import LaunchError
from jaxserve.models.decoder import Decoder
from jaxserve.models.param_spec import Weights
from jaxserve.parallel.mesh import weight_format
from jaxserve.runner.batch import BatchLayout, ForwardBatch, RowTable
from jaxserve.runner.buckets import Bucket, ForwardShape
from jaxserve.runner.programs import StepModel, StepPrograms
from jaxserve.runner.transfer import to_devices, zeros
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, ScheduledRow, SchedulerOutput
from kernels_pallas.dispatch import choose_attention
from kernels_pallas.paged_attention.api import AttentionBackend, Cache

logger = logging.getLogger(__name__)

_NUM_TOKENS = 2048
# Other tokens have larger values.
_MARGIN = 1.5
_LARGEST = 127
# Lower limit of a channel's peak, as a fraction of the largest peak of its head.
_SMALLEST = 1 / 8


def with_kv_scales(served: StepModel, weights: Weights, wait_for_hosts: Callable[[], object]) -> Weights:
    """Return the weights with KV scales (see `jaxserve.layers.kv_scales`) measured on random tokens.

    Args:
        served: the model with its int8 cache.
        weights: its weights on the mesh, without KV scales.
        wait_for_hosts: waits for the other hosts before the first step.

    Raises:
        LaunchError: some keys or values are not finite.
    """
    plain = served.decoder.without_kv_scales()
    model = _to_measure(served, plain)
    programs = StepPrograms(model)
    spec = served.decoder.param_specs["layers", "attention", "cache_scales"]
    results = weight_format(spec.axes, spec.shape, served.mesh), NamedSharding(served.mesh, PartitionSpec())
    measure = partial(_scales, model.backends.attention, plain.config.rope_dim, programs.num_replicas)
    measure = jax.jit(measure, out_shardings=results)
    forward = programs.lower_forward(ForwardShape(model.buckets[0])).compile()
    measured = measure.lower(programs.cache_shapes()).compile()
    wait_for_hosts()
    cache, last_token_R = zeros(programs.cache_shapes()), zeros(programs.state_shapes().last_token_R)
    for prompt in _prompts(model.layout, model.buckets[0]):
        batch = jax.tree.map(lambda array: np.stack([array] * programs.num_replicas), prompt)
        cache, _ = forward(weights, {}, cache, last_token_R, to_devices(batch, programs.by_replica))
    scales, finite = measured(cache)
    if not finite:
        raise LaunchError("--kv-cache-dtype int8: keys or values of random tokens are not finite")
    logger.info("KV cache: int8, with scales calibrated on random tokens")
    attention = {**weights["layers"]["attention"], "cache_scales": scales}
    return {**weights, "layers": {**weights["layers"], "attention": attention}}


def _to_measure(served: StepModel, plain: Decoder) -> StepModel:
    """Return the model with its largest bucket only and a cache in the activations' dtype that holds all prompts."""
    bucket, page_size = served.buckets[0], served.layout.page_size
    prompt_pages = min(-(-bucket.num_tokens // page_size), served.layout.pages_per_row)
    num_prompts = -(-_NUM_TOKENS // min(bucket.num_tokens, prompt_pages * page_size))
    layout = served.layout._replace(num_pages=num_prompts * prompt_pages, pages_per_row=prompt_pages)
    config = dataclasses.replace(served.backends.attention.config, dtype=plain.dtype, num_pages=layout.num_pages)
    backends = served.backends._replace(attention=choose_attention("auto", config, served.mesh).impl)
    return served._replace(decoder=plain, backends=backends, layout=layout, buckets=(bucket,), lora_pool=None)


def _prompts(layout: BatchLayout, bucket: Bucket) -> Iterator[ForwardBatch]:
    """Yield prompts of random tokens, one per step, that fill the cache."""
    rng = np.random.default_rng(0)
    num_tokens = min(bucket.num_tokens, layout.pages_per_row * layout.page_size)
    rows = RowTable(layout)
    for first_page in range(0, layout.num_pages, layout.pages_per_row):
        prompt = ScheduledRow(
            row=0,
            token_ids=tuple(rng.integers(layout.vocab_size, size=num_tokens).tolist()),
            num_computed_tokens=0,
            new_page_ids=tuple(range(first_page, first_page + layout.pages_per_row)),
            samples=False,
        )
        new = NewRow(row=0, sampling=SamplingParams(), seed=0)
        rows.admit(new)
        yield rows.build(SchedulerOutput(step=0, new_rows=(new,), rows=(prompt,)), bucket)


def _scales(attention: AttentionBackend, rope_dim: int, num_replicas: int, cache: Cache) -> tuple[jax.Array, jax.Array]:
    """Return KV scales f32[L, 2, K, H], or [L, 1, K, H] if values are part of their keys, and whether all are finite.

    Args:
        attention: the backend of the cache.
        rope_dim: number of rotated channels, the last ones of a key; their first half is paired with their second half.
        num_replicas: number of replicas of the model.
        cache: the cache after the prompts have run.
    """
    num_layers = attention.config.num_layers

    def peaks(pages: jax.Array) -> jax.Array:
        """Return the largest magnitudes [L, K, Z] of an array [replicas * L * P, K, S, Z]."""
        pages = pages.reshape(num_replicas, num_layers, -1, *pages.shape[1:])
        return jnp.max(jnp.abs(pages), axis=(0, 2, 4))

    peaks_L2KH = jnp.stack(attention.unpack(jax.tree.map(peaks, cache)), axis=1).astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(peaks_L2KH))
    # In slowly rotating pairs, a value of one channel in these prompts moves to the other channel in longer ones.
    pairs_LK2R = peaks_L2KH[:, 0, :, -rope_dim:].reshape(*peaks_L2KH[:, 0].shape[:-1], 2, -1)
    larger_LKR = jnp.max(pairs_LK2R, axis=-2)
    peaks_L2KH = peaks_L2KH.at[:, 0, :, -rope_dim:].set(jnp.concatenate([larger_LKR, larger_LKR], axis=-1))
    # A channel that is small for these tokens may be larger for others.
    head_L2K1 = jnp.max(peaks_L2KH, axis=-1, keepdims=True)
    peaks_L2KH = jnp.maximum(peaks_L2KH, head_L2K1 * _SMALLEST)
    return jnp.where(peaks_L2KH > 0, peaks_L2KH * (_MARGIN / _LARGEST), 1.0), finite
