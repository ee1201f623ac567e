"""Measures the legal tiles of the attention kernels, and keeps the fastest of those that are right."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxserve.device_check.events import Tuned
from jaxserve.device_check.kernels import Kernels
from jaxserve.device_check.specs import AttentionSpec, KernelSpecs
from jaxserve.device_check.speed_cases import attention_config, time_attention
from jaxserve.device_check.timing import Loop, seconds_of
from kernels_pallas.paged_attention.cases import Case, attention_case
from kernels_pallas.tuning import TileFields, TuningTable

# (query lengths, key lengths) by the part of attention: many rows, and one long one.
_DECODE = (([1] * 32, [2048] * 32), ([1], [16384]))
_PREFILL = (([2048], [2048]),)
_STEPS = {"decode": _DECODE, "prefill": _PREFILL, "both": (*_DECODE, *_PREFILL)}
_SMALL_STEPS = {"decode": (([1], [40]),), "prefill": (([9], [9]),), "both": (([1], [40]), ([9], [9]))}
_SMALL_TILES = 2


def tune_attention(specs: KernelSpecs, kernels: Kernels, loop: Loop, *, small: bool) -> Iterator[Tuned]:
    """Yield the fastest tile of each attention kernel.

    Args:
        specs: the model.
        kernels: the kernels.
        loop: how often to time each tile.
        small: time two tiles in tiny steps instead of all in a server's, for interpreters.

    Raises:
        NotImplementedError: there are no attention kernels for the model.
    """
    spec = specs.attention
    for key, tiles in kernels.attention_tiles(attention_config(spec, [1])).items():
        part = key.split(":")[0].rsplit(" ", 1)[-1]
        steps = (_SMALL_STEPS if small else _STEPS)[part]
        seconds: list[tuple[float, TileFields]] = []
        for tile in tiles[:_SMALL_TILES] if small else tiles:
            tuning = TuningTable({key: tile})
            if _is_right(spec, kernels, tuning):
                seconds.append((_seconds(spec, kernels, tuning, steps, loop), tile))
        if not seconds or seconds[0][1] != tiles[0]:
            raise NotImplementedError(f"{key}: the tile that the formula chooses gives wrong results")
        best, tile = min(seconds, key=lambda each: each[0])
        yield Tuned(
            model=specs.model,
            op="paged_attention",
            key=key,
            tile=dict(tile),
            seconds=(best, seconds[0][0]),
            tried=len(seconds),
        )


def _is_right(spec: AttentionSpec, kernels: Kernels, tuning: TuningTable) -> bool:
    """Return whether the results with a tile are those of the reference."""
    size = spec.page_size
    case = Case(
        q_lens=(1, 1, 5, 40),
        kv_lens=(size, 2 * size + 1, 5, size + 40),
        page_size=size,
        heads=spec.heads,
        value_dim=spec.value_dim,
        window=spec.windows[0],
        sinks=spec.sinks,
    )
    try:
        call = attention_case(kernels.attention(case.config(jnp.dtype(spec.dtype)), tuning), case)
        call.verify(jax.jit(call.run)(*call.arguments))
    # A tile that the compiler refuses or whose results differ is no candidate.
    except Exception:
        return False
    return True


def _seconds(
    spec: AttentionSpec,
    kernels: Kernels,
    tuning: TuningTable,
    steps: Sequence[tuple[list[int], list[int]]],
    loop: Loop,
) -> float:
    """Return the sum of the durations of all steps."""
    return sum(
        seconds_of(time_attention(kernels.attention(attention_config(spec, kv_lens), tuning), q_lens, kv_lens), loop)
        for q_lens, kv_lens in steps
        if max(kv_lens) <= spec.context_length
    )
