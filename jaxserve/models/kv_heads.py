"""Key/value heads that are repeated, because there are fewer of them than devices."""

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.models.decoder import Path

_KV_PROJECTIONS = ("k_proj", "v_proj")


def is_kv_projection(path: Path) -> bool:
    """Whether a weight's rows are key/value heads."""
    return path[-2] in _KV_PROJECTIONS


def kv_head_rows(path: Path, config: ModelConfig, copies: int) -> tuple[int, int]:
    """(rows of one head, copies of each head) for key/value projections, else (0, 1)."""
    return (config.head_dim, copies) if copies > 1 and is_kv_projection(path) else (0, 1)


def repeat_heads(array: np.ndarray, axis: int, rows: int, copies: int) -> np.ndarray:
    """Repeat each head (`rows` consecutive entries of an axis) `copies` times."""
    heads = array.reshape(*array.shape[:axis], -1, rows, *array.shape[axis + 1 :])
    return np.repeat(heads, copies, axis=axis).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])
