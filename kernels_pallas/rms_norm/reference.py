"""RMSNorm in numpy float64."""

import numpy as np


def rms_norm(x_TD: np.ndarray, weight_D: np.ndarray, eps: float, offset: float = 0.0) -> np.ndarray:
    """Return f64[T, D]; see `RmsNorm`."""
    x_TD = x_TD.astype(np.float64)
    return x_TD / np.sqrt(np.mean(x_TD**2, axis=-1, keepdims=True) + eps) * (weight_D.astype(np.float64) + offset)
