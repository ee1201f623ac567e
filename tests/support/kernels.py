"""The Pallas kernels, interpreted on the CPU."""

from typing import TYPE_CHECKING, Any

import jax
import pytest

from jaxserve.parallel.mesh import make_mesh

if TYPE_CHECKING:
    from kernels_pallas.interpreted import InterpretedKernels

needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
KERNELS = [pytest.param("tpu", marks=needs_pallas), pytest.param("gpu", marks=needs_pallas)]


def interpreted(platform: str, tp_size: int = 1, **options: Any) -> "InterpretedKernels":
    """Return the kernels of a platform; imported late, since older versions of JAX cannot."""
    from kernels_pallas.interpreted import InterpretedKernels

    assert platform in ("tpu", "gpu")
    return InterpretedKernels(platform, make_mesh(tp_size), **options)
