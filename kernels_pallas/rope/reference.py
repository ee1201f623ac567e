"""Rotary position embedding in numpy float64."""

import numpy as np


def rotate(x_TNH: np.ndarray, cos_TC: np.ndarray, sin_TC: np.ndarray) -> np.ndarray:
    """Return f64[T, N, H]; see `Rope`."""
    first, second = np.split(x_TNH.astype(np.float64), 2, axis=-1)
    cos, sin = cos_TC.astype(np.float64)[:, None], sin_TC.astype(np.float64)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
