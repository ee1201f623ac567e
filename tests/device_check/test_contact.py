"""Calls of kernels that are wrong, differ when they are repeated, or do not exist."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.device_check.contact import run_case
from jaxserve.device_check.contact_cases import ContactCase
from jaxserve.device_check.events import Outcome
from kernels_pallas.kernel_case import KernelCase


def outcome(run: Any, *, want: float = 3.0) -> Outcome:
    def make(_: Any) -> KernelCase:
        return KernelCase(
            run=run, arguments=(jnp.ones(3),), verify=lambda out: np.testing.assert_allclose(out.sum(), want)
        )

    kernels: Any = None
    return run_case("model", ContactCase("op", "call", True, make), kernels, 3)


def test_a_right_result_that_repeats() -> None:
    got = outcome(lambda x: x)
    assert (got.model, got.op, got.name, got.status, got.detail) == ("model", "op", "call", "passed", "")


def test_nan_repeats() -> None:
    assert outcome(lambda x: x * jnp.nan, want=np.nan).status == "passed"


def test_a_wrong_result_says_what_differs() -> None:
    got = outcome(lambda x: 2 * x)
    assert got.status == "failed"
    assert "Mismatched elements" in got.detail


def test_other_bits_in_a_repetition() -> None:
    count = iter(range(9))

    def noisy(x: jax.Array) -> jax.Array:
        noise = jax.pure_callback(lambda: np.float32(1e-6 * (next(count) // 2)), jax.ShapeDtypeStruct((), jnp.float32))
        return x + noise

    got = outcome(noisy)
    assert (got.status, got.detail) == ("failed", "2 of 3 repetitions gave other bits")


def test_no_kernel_is_no_failure() -> None:
    def missing(_: jax.Array) -> jax.Array:
        raise NotImplementedError("head dim 8")

    got = outcome(missing)
    assert (got.status, got.detail) == ("unsupported", "head dim 8")


def test_an_exception_is_a_failure() -> None:
    def broken(_: jax.Array) -> jax.Array:
        raise ValueError("bad tile")

    got = outcome(broken)
    assert (got.status, got.detail) == ("failed", "ValueError: bad tile")
