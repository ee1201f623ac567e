"""Sampling in plain numpy, one row at a time: the reference that every implementation is tested against."""

from dataclasses import dataclass
from typing import Any

import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@dataclass(frozen=True, kw_only=True)
class RowParams:
    """Sampling parameters of one row; see `SamplingInputs` and `SamplingState`."""

    seed: int = 0
    position: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    counts: dict[int, int] | None = None
    bias: dict[int, float] | None = None
    allowed: tuple[int, ...] | None = None
    forbidden: tuple[int, ...] = ()


def threefry2x32_reference(key: tuple[int, int], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Compute Threefry-2x32-20 on integers: Python's, or arrays of 64 bits."""
    mask = 0xFFFFFFFF
    keys = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x0, x1 = (counter[0] + keys[0]) & mask, (counter[1] + keys[1]) & mask
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = (x0 + x1) & mask
            x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & mask) ^ x0
        x0 = (x0 + keys[(block + 1) % 3]) & mask
        x1 = (x1 + keys[(block + 2) % 3] + block + 1) & mask
    return x0, x1


def adjusted_logits(logits_V: np.ndarray, params: RowParams) -> np.ndarray:
    """Return float64 logits after penalties, mask, bias, forbidden tokens and temperature."""
    out_V = logits_V.astype(np.float64)
    for token, count in (params.counts or {}).items():
        value = out_V[token]
        value = value * params.repetition if value < 0 else value / params.repetition
        out_V[token] = value - params.frequency * count - params.presence
    if params.allowed is not None:
        out_V[np.setdiff1d(np.arange(len(out_V)), params.allowed)] = -np.inf
    for token, bias in (params.bias or {}).items():
        out_V[token] += bias
    out_V[list(params.forbidden)] = -np.inf
    return out_V / (params.temperature or 1.0)


def kept_tokens(logits_V: np.ndarray, params: RowParams) -> np.ndarray:
    """Return the ids that survive top-k, top-p and min-p, likeliest first."""
    order = np.argsort(-logits_V, kind="stable")
    mass = np.exp(logits_V[order] - np.logaddexp.reduce(logits_V))
    before = np.cumsum(mass) - mass
    kept = (before <= params.top_p) & (mass >= params.min_p * mass[0])
    if params.top_k > 0:
        kept &= np.arange(len(order)) < params.top_k
    return order[kept]


def sample_reference(logits_V: np.ndarray, params: RowParams) -> tuple[int, float]:
    """Sample one token; return it and its log-probability."""
    adjusted_V = adjusted_logits(logits_V, params)
    logprobs_V = adjusted_V - np.logaddexp.reduce(adjusted_V)
    if params.temperature == 0:
        token = int(np.argmax(adjusted_V))
        return token, float(logprobs_V[token])
    kept = kept_tokens(adjusted_V, params)
    seed = params.seed % 2**64
    bits, _ = threefry2x32_reference((seed & 0xFFFFFFFF, seed >> 32), (params.position, kept.astype(np.int64)))
    uniform = ((bits >> 9) + 0.5) * 2.0**-23
    token = int(kept[np.argmax(adjusted_V[kept] - np.log(-np.log(uniform)))])
    return token, float(logprobs_V[token])
