"""Tiles that were measured to be the fastest on a kind of device; where there are none, formulas choose.

`python -m jaxserve.device_check --tune` fills a table, and the server reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import jax.numpy as jnp

from kernels_pallas.paged_attention.api import AttentionConfig

T = TypeVar("T")

# The fields of a tile, by name.
TileFields = Mapping[str, int | bool]


@dataclass(frozen=True)
class TuningTable:
    """Tiles by the kernel and what its tile depends on; see `attention_key`."""

    tiles: Mapping[str, TileFields] = field(default_factory=dict)


NO_TUNING = TuningTable()


def attention_key(config: AttentionConfig, part: str) -> str:
    """Return the key of a tile of paged attention.

    Args:
        config: config of one device's heads.
        part: `decode`, `prefill`, or `both` where one tile serves both.
    """
    heads = f"{config.num_q_heads}/{config.num_kv_heads} heads of {config.head_dim}"
    if config.value_dim is not None:
        heads += f" with values of {config.value_dim}"
    return f"attention {part}: {heads}, {jnp.dtype(config.dtype).name}, pages of {config.page_size}"


def fields_of(tile: Any) -> dict[str, int | bool]:
    """Return the fields of a tile, a dataclass or a named tuple."""
    return dict(tile._asdict()) if hasattr(tile, "_asdict") else asdict(tile)


def pick(legal: Sequence[T], fields: TileFields | None) -> T:
    """Return the legal tile with these fields; the first one, which a formula chose, if there is none."""
    return next((tile for tile in legal if fields_of(tile) == fields), legal[0])
