"""Repetition of KV heads if there are fewer of them than devices."""

import numpy as np

from jaxserve.layers.args import DecoderArgs
from jaxserve.models.param_spec import ParamSpec


def replicated_head_rows(spec: ParamSpec, args: DecoderArgs) -> tuple[int, int]:
    """Return (rows per head, number of copies of each head) of a weight whose rows are KV heads, else (0, 1)."""
    times = args.parallelism.kv_head_replication
    if times == 1 or "kv_heads" not in spec.axes:
        return (0, 1)
    return (args.config.head_dim // (1 if spec.packing is None else spec.packing.block_rows), times)


def repeat_heads(array: np.ndarray, axis: int, rows: int, times: int) -> np.ndarray:
    """Repeat each head (`rows` consecutive entries of an axis) `times` times."""
    heads = array.reshape(*array.shape[:axis], -1, rows, *array.shape[axis + 1 :])
    return np.repeat(heads, times, axis=axis).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])
