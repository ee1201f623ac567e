"""Device state that is kept between steps besides the cache: last tokens and sampling state, by row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jaxserve.step import NewRow
from kernels_pallas.sampling.api import SampleOutput, SamplingState
from kernels_pallas.sampling.common.summary import Shard

# Capacity for the request's stop tokens and the model's end-of-sequence ids.
_MAX_STOPS = MAX_STOP_TOKEN_IDS + 16


class DeviceState(NamedTuple):
    """Row-indexed state; each replica's last row is spare and stays neutral.

    Attributes:
        last_token_R: i32, the last sampled token; it feeds the next step without a round trip to the host.
        sampling: see `SamplingState`.
    """

    last_token_R: jax.Array
    sampling: SamplingState

    def record(self, write_row_B: jax.Array, out: SampleOutput, shard: Shard) -> "DeviceState":
        """Return the state after a step's tokens; drops rows past the end, and counts of other shards' tokens."""
        counts_RV = self.sampling.counts_RV
        size = counts_RV.shape[1]
        local_B = out.token_B - shard.first(size)
        local_B = jnp.where(local_B < 0, size, local_B)
        return DeviceState(
            self.last_token_R.at[write_row_B].set(out.token_B, mode="drop"),
            self.sampling._replace(counts_RV=counts_RV.at[write_row_B, local_B].add(1, mode="drop")),
        )


class RowState(NamedTuple):
    """New contents of one row of `SamplingState`."""

    counts_V: np.ndarray
    bias_ids_J: np.ndarray
    bias_values_J: np.ndarray
    stop_ids_J: np.ndarray


def empty_state(rows: int, vocab_size: int, shardings: DeviceState) -> DeviceState:
    """Return neutral state of `rows` rows, spare ones included; `shardings` has one sharding per array."""
    last_token, (counts, bias_ids, bias_values, stop_ids) = shardings
    return DeviceState(
        jnp.zeros(rows, jnp.int32, device=last_token),
        SamplingState(
            counts_RV=jnp.zeros((rows, vocab_size), jnp.int32, device=counts),
            bias_ids_RJ=jnp.full((rows, MAX_LOGIT_BIAS), vocab_size, jnp.int32, device=bias_ids),
            bias_values_RJ=jnp.zeros((rows, MAX_LOGIT_BIAS), jnp.float32, device=bias_values),
            stop_ids_RJ=jnp.full((rows, _MAX_STOPS), vocab_size, jnp.int32, device=stop_ids),
        ),
    )


def needs_row_state(new: NewRow) -> bool:
    """Return whether a request's sampling reads its row of `SamplingState`."""
    return new.sampling.penalised or bool(new.sampling.logit_bias) or new.sampling.min_tokens > 0


def row_state(new: NewRow, vocab_size: int) -> RowState:
    """Return a row's contents for a new sequence; `counts_V` includes output tokens from before a preemption."""
    bias_ids_J = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
    bias_values_J = np.zeros(MAX_LOGIT_BIAS, np.float32)
    for index, (token_id, bias) in enumerate(new.sampling.logit_bias.items()):
        bias_ids_J[index] = token_id
        bias_values_J[index] = -np.inf if bias == -100 else bias
    stop_ids_J = np.full(_MAX_STOPS, vocab_size, np.int32)
    stops = sorted({*new.sampling.stop_token_ids, *new.eos_token_ids})
    stop_ids_J[: len(stops)] = stops
    counts_V = np.bincount(np.asarray(new.output_token_ids, np.int64), minlength=vocab_size)
    return RowState(counts_V.astype(np.int32), bias_ids_J, bias_values_J, stop_ids_J)


def write_row(state: DeviceState, row: jax.Array, new: RowState) -> DeviceState:
    """Replace one row of the sampling state."""
    s = state.sampling
    return state._replace(
        sampling=SamplingState(
            counts_RV=s.counts_RV.at[row].set(new.counts_V),
            bias_ids_RJ=s.bias_ids_RJ.at[row].set(new.bias_ids_J),
            bias_values_RJ=s.bias_values_RJ.at[row].set(new.bias_values_J),
            stop_ids_RJ=s.stop_ids_RJ.at[row].set(new.stop_ids_J),
        )
    )
