"""Rotary position embedding (arXiv:2104.09864) with the context-stretching variants of Llama 3 and YaRN."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.config import RopeConfig
from kernels_pallas.rope.api import Angles


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the radians per position of each of the head's `head_dim / 2` planes, f32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = 1.0 / rope.theta**exponent
    if rope.frequency_divisors is not None:
        frequency = frequency / np.asarray(rope.frequency_divisors, np.float64)
    match rope.scaling:
        case "default":
            return frequency.astype(np.float32)
        case "linear":
            return (frequency / rope.factor).astype(np.float32)
        case "llama3":
            return _llama3(rope, frequency).astype(np.float32)
        case "yarn":
            return _yarn(rope, frequency, head_dim).astype(np.float32)


def rope_attention_factor(rope: RopeConfig) -> float:
    """Return the multiplier of cos and sin; 1 except for YaRN."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _llama3(rope: RopeConfig, frequency: np.ndarray) -> np.ndarray:
    """Stretch long wavelengths by `factor`, keep short ones, and blend in between."""
    turns = rope.original_max_position * frequency / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequency / rope.factor + blend * frequency


def _yarn(rope: RopeConfig, frequency: np.ndarray, head_dim: int) -> np.ndarray:
    """Interpolate low frequencies, keep high ones, and ramp in between (arXiv:2309.00071, section 3.2)."""

    def plane_of(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = plane_of(rope.beta_fast), plane_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return frequency / rope.factor * ramp + frequency * (1 - ramp)


def rope_angles(positions_T: jax.Array, rope: RopeConfig, head_dim: int) -> Angles:
    """Return cosine and sine of each token's angles, times the attention factor."""
    factor = rope_attention_factor(rope)
    angles = positions_T.astype(jnp.float32)[:, None] * jnp.asarray(rope_frequencies(rope, head_dim))
    return Angles(jnp.cos(angles) * factor, jnp.sin(angles) * factor)
