"""Grouped matmul in numpy float64."""

import numpy as np


def grouped_matmul(x_RI: np.ndarray, w_XOI: np.ndarray, group_R: np.ndarray) -> np.ndarray:
    """Multiply each row by its group's matrix; return f64[R, O]."""
    return np.einsum("ri,roi->ro", x_RI.astype(np.float64), w_XOI.astype(np.float64)[group_R])
