"""Runs one call of a kernel: compares it with the reference, then repeats it."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.device_check.contact_cases import ContactCase
from jaxserve.device_check.events import Outcome, Status
from jaxserve.device_check.kernels import Kernels

_DETAIL_CHARS = 600


def run_case(model: str, case: ContactCase, kernels: Kernels, repeats: int) -> Outcome:
    """Run a call `1 + repeats` times; all results must have the same bits."""
    started = time.perf_counter()

    def outcome(status: Status, detail: str = "") -> Outcome:
        return Outcome(
            model=model,
            op=case.op,
            name=case.name,
            status=status,
            detail=detail.strip()[:_DETAIL_CHARS],
            seconds=time.perf_counter() - started,
        )

    try:
        call = case.make(kernels)
        run = jax.jit(call.run).lower(*call.arguments).compile()
        result = jax.block_until_ready(run(*call.arguments))
        call.verify(result)
        differing = sum(not _same_bits(result, run(*call.arguments)) for _ in range(repeats))
    except NotImplementedError as error:
        return outcome("unsupported", str(error))
    # Whatever a kernel raises is what this check is there to report.
    except Exception as error:
        return outcome("failed", f"{type(error).__name__}: {error}")
    if differing:
        return outcome("failed", f"{differing} of {repeats} repetitions gave other bits")
    return outcome("passed")


@jax.jit
def _equal(a: Any, b: Any) -> jax.Array:
    """Compare bits, so that NaN equals itself."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.stack([jnp.all(_bits(x) == _bits(y)) for x, y in pairs]).all()


def _same_bits(a: Any, b: Any) -> bool:
    return bool(_equal(a, b))


def _bits(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
