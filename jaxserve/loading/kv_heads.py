"""Key/value heads that are repeated, because there are fewer of them than devices."""

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.models.param_spec import ParamSpec


def kv_head_rows(spec: ParamSpec, config: ModelConfig, copies: int) -> tuple[int, int]:
    """(rows of one head, copies of each head) of a weight whose rows are key/value heads, else (0, 1)."""
    if copies == 1 or "kv_heads" not in spec.axes:
        return (0, 1)
    return (config.head_dim // (1 if spec.stored is None else spec.stored.block_rows), copies)


def repeat_heads(array: np.ndarray, axis: int, rows: int, copies: int) -> np.ndarray:
    """Repeat each head (`rows` consecutive entries of an axis) `copies` times."""
    heads = array.reshape(*array.shape[:axis], -1, rows, *array.shape[axis + 1 :])
    return np.repeat(heads, copies, axis=axis).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])
