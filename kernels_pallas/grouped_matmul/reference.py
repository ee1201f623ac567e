"""What grouped products are, in numpy and float64."""

import numpy as np


def grouped_matmul(x_RI: np.ndarray, w_XOI: np.ndarray, group_R: np.ndarray) -> np.ndarray:
    """f64[R, O]: each row with its own group's matrix."""
    return np.einsum("ri,roi->ro", x_RI.astype(np.float64), w_XOI.astype(np.float64)[group_R])
