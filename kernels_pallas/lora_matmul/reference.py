"""LoRA matmuls in numpy float64, token by token."""

import numpy as np


def lora_matmul(x_TI: np.ndarray, a_SRI: np.ndarray, b_SRO: np.ndarray, slot_T: np.ndarray) -> np.ndarray:
    """Return f64[T, O]; see `LoraMatmul`."""
    out_TO = np.zeros((len(x_TI), b_SRO.shape[-1]))
    for token, slot in enumerate(slot_T):
        if slot:
            h_R = a_SRI[slot - 1].astype(np.float64) @ x_TI[token].astype(np.float64)
            out_TO[token] = h_R @ b_SRO[slot - 1].astype(np.float64)
    return out_TO
