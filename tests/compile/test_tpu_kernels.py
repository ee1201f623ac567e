"""The TPU kernels, compiled for each chip."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.parallel.mesh import mesh_of
from jaxserve.plan.targets import parse_target, target_devices
from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.quantized import QuantizedFormat, QuantizedRows
from kernels_pallas.token_tiles import Blocks
from tests.support.marks import slow

if TYPE_CHECKING:
    from kernels_pallas.dispatch import make_grouped_matmul
else:
    pytest.importorskip("jax", minversion="0.11")
    from kernels_pallas.dispatch import make_grouped_matmul
