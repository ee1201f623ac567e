"""Paged attention in plain numpy and float64: the reference that every backend is tested against."""

import numpy as np

from kernels_pallas.paged_attention.api import AttentionConfig


def paged_attention_reference(
    q_TNH: np.ndarray,
    k_PSKH: np.ndarray,
    v_PSKH: np.ndarray,
    kv_lens_B: np.ndarray,
    page_table_BM: np.ndarray,
    cu_q_lens_B1: np.ndarray,
    num_rows: int,
    config: AttentionConfig,
    sinks_N: np.ndarray | None = None,
) -> np.ndarray:
    """Attend one layer whose keys and values, this step's included, are already in the pages.

    Returns:
        o_TNH in float64; 0 for tokens that belong to no row.
    """
    o_TNH = np.zeros((*q_TNH.shape[:2], config.out_dim), np.float64)
    group = config.num_q_heads // config.num_kv_heads
    for row in range(num_rows):
        first, end, kv_len = int(cu_q_lens_B1[row]), int(cu_q_lens_B1[row + 1]), int(kv_lens_B[row])
        pages = page_table_BM[row, : -(-kv_len // config.page_size)]
        k_SKH = k_PSKH[pages].reshape(-1, *k_PSKH.shape[2:])[:kv_len].astype(np.float64)
        v_SKH = v_PSKH[pages].reshape(-1, *v_PSKH.shape[2:])[:kv_len].astype(np.float64)
        for token in range(first, end):
            position = kv_len - (end - token)
            start = 0 if config.window is None else max(0, position + 1 - config.window)
            for head in range(config.num_q_heads):
                keys = k_SKH[start : position + 1, head // group]
                scores = keys @ q_TNH[token, head].astype(np.float64) * config.scale
                if config.soft_cap is not None:
                    scores = config.soft_cap * np.tanh(scores / config.soft_cap)
                sink = -np.inf if sinks_N is None else float(sinks_N[head])
                row_max = max(scores.max(), sink)
                weights = np.exp(scores - row_max)
                row_sum = weights.sum() + np.exp(sink - row_max)
                o_TNH[token, head] = weights @ v_SKH[start : position + 1, head // group] / row_sum
    return o_TNH
