"""The bytes of a decode step: those that must move, and those that the step's kernels move by their own schedule.

The load is uniform: every row has the same number of keys, and routers choose experts evenly.
"""

from collections import Counter
from typing import NamedTuple

import jax.numpy as jnp

from jaxserve.layout.layout import EngineLayout
from jaxserve.models.param_spec import ParamSpec
from jaxserve.plan.cost import read_cost
from jaxserve.plan.hlo import Array, HloProgram, Instruction
from jaxserve.plan.report import experts_read
from kernels_pallas.paged_attention.api import with_window
from kernels_pallas.shards import DATA, model_size

_LOGIT_BYTES = 4


class DecodeLoad(NamedTuple):
    """A decode step.

    Attributes:
        rows: number of requests of a replica.
        context: number of keys of each request, its new one included.
        num_rows: rows that the step is compiled for.
    """

    rows: int
    context: int
    num_rows: int


def roofline_share(engine: EngineLayout, program: HloProgram, load: DecodeLoad) -> float:
    """Return the bytes that a decode step must move over those that its program moves."""
    return needed_bytes(engine, load) / moved_bytes(engine, program, load)


def moved_bytes(engine: EngineLayout, program: HloProgram, load: DecodeLoad) -> float:
    """Return the bytes that a device moves in a decode step."""
    return read_cost(program).num_bytes(lambda kernel: kernel_bytes(engine, load, kernel))


def needed_bytes(engine: EngineLayout, load: DecodeLoad) -> float:
    """Return the bytes that a device must move in a step.

    These are the weights that have tokens, the keys and values of live tokens, the step's new ones, the inputs and
    outputs of every matrix product, and the logits.
    """
    return _weight_bytes(engine, load) + _kv_bytes(engine, load) + _activation_bytes(engine, load)


def kernel_bytes(engine: EngineLayout, load: DecodeLoad, kernel: Instruction) -> float:
    """Return the bytes that one call of a kernel moves.

    Raises:
        NotImplementedError: the kernel has no accounting.
    """
    match kernel.kernel:
        case "paged_decode":
            return _attention_bytes(engine, load)
        case "merge_decode":  # counted with `paged_decode`
            return 0
        case "route" | "rope" | "rms_norm":
            # Arrays with an entry per row, and one layer of each stack.
            rows = {array.shape[0] for array in kernel.results} | {load.num_rows}
            return kernel.num_bytes + sum(
                array.num_bytes / (1 if array.shape[0] in rows else array.shape[0])
                for array in kernel.operand_arrays
                if array.shape
            )
        case "kv_update":
            # Each token's keys and values are read, and written to their slots.
            return 2 * load.rows / load.num_rows * sum(array.num_bytes for array in _new_tokens(kernel))
        case "head_matmul":
            # One of the matrices of each head, of keys or of values.
            rows, stack = (array for array in kernel.operand_arrays if len(array.shape) == 3)
            heads = engine.step.decoder.config.num_q_heads // model_size(engine.step.mesh)
            return stack.num_bytes / stack.shape[0] * heads + rows.num_bytes + kernel.num_bytes
        case "add_splits":
            # The sums of each split. Those biases that it reads are not counted.
            (sums,) = (array for array in kernel.operand_arrays if len(array.shape) == 3)
            return kernel.num_bytes + sums.num_bytes
        case "grouped_matmul":
            return _product_bytes(engine, load, kernel)
        case name:
            raise NotImplementedError(f"the bytes of kernel {name} are not accounted for")


def _new_tokens(kernel: Instruction) -> tuple[Array, ...]:
    """Return the operands of `kv_update` that hold the step's keys and values: one for each cache that it returns."""
    return kernel.operand_arrays[: len(kernel.results)]


def _attention_bytes(engine: EngineLayout, load: DecodeLoad) -> float:
    """Return the bytes of one layer, on average over layers with different windows."""
    step = engine.step
    layers = step.decoder.config.layers
    total = 0
    for window, count in Counter(layer.window for layer in layers).items():
        backend = with_window(step.backends.attention, window)
        kv_lens = [load.context] * load.rows
        total += count * backend.decode_bytes(kv_lens, load.num_rows)
    return total / len(layers)


def _product_bytes(engine: EngineLayout, load: DecodeLoad, kernel: Instruction) -> float:
    """Return the bytes of the matrices that have rows, and of the rows and results in the blocks in use."""
    operands = [array for array in kernel.operand_arrays if array.shape]
    groups = next(array for array in operands if array.dtype == "s32")
    # Metadata of the blocks come first, then the rows, then the matrices with their scales.
    rows, *of_matrices = [array for array in operands if len(array.shape) > 1]
    num_matrices = max(of_matrices, key=lambda array: array.num_bytes).shape[0]
    by_matrix = [array for array in of_matrices if array.shape[0] == num_matrices]
    live = _live_experts(engine, load, num_matrices)
    # Few rows: every expert that has rows has one block of them. A matrix for all rows has all blocks.
    used = 1.0 if live is None else min(1.0, live / groups.shape[0])
    others = [array for array in (rows, *of_matrices) if array not in by_matrix]
    # A kernel that takes the rows of the blocks itself reads those of all tokens: two arrays of 4-bit matrices' inputs.
    takes = len(rows.shape) == 2 and rows.shape[0] != kernel.results[0].shape[0]
    whole = [array for array in others if takes and array.shape[0] == rows.shape[0]]
    by_block = sum(array.num_bytes for array in others if array not in whole) + kernel.num_bytes
    of_matrix = sum(array.num_bytes for array in by_matrix) / num_matrices
    return (live or 1.0) * of_matrix + used * by_block + sum(array.num_bytes for array in whole)


def _live_experts(engine: EngineLayout, load: DecodeLoad, num_matrices: int) -> float | None:
    """Return how many of a device's experts of a layer have rows, or None for the matrices of linear modules."""
    specs = engine.step.decoder.param_specs.values()
    experts = next((spec for spec in specs if spec.of_experts), None)
    if experts is None:
        return None
    num_layers, num_experts, *_ = experts.shard_shape(engine.step.mesh)
    if num_matrices != num_layers * num_experts:
        return None
    return num_experts * experts_read(engine.step.decoder.config, load.rows * _sharing_replicas(engine))


def _sharing_replicas(engine: EngineLayout) -> int:
    """Return the number of replicas whose tokens an expert gets."""
    step = engine.step
    return step.mesh.shape[DATA] if step.decoder.args.parallelism.shared_experts else 1


def _weight_bytes(engine: EngineLayout, load: DecodeLoad) -> float:
    decoder, mesh = engine.step.decoder, engine.step.mesh
    share = experts_read(decoder.config, load.rows * _sharing_replicas(engine))
    gathered = () if decoder.config.tie_word_embeddings else (("embed", "weight"),)
    return sum(
        spec.shard_bytes(mesh) * (share if spec.of_experts else 1)
        for path, spec in decoder.param_specs.items()
        if path not in gathered
    )


def _kv_bytes(engine: EngineLayout, load: DecodeLoad) -> float:
    token = engine.pool_bytes / (engine.cache.num_pages * engine.cache.page_size)
    layers = engine.step.decoder.config.layers
    seen = sum(min(load.context, layer.window or load.context) for layer in layers) / len(layers)
    return load.rows * (seen + 1) * token


def _activation_bytes(engine: EngineLayout, load: DecodeLoad) -> float:
    step = engine.step
    config = step.decoder.config
    elements = sum(
        len(spec.layers) * _rows_of_product(engine, spec, load) * _row_elements(engine, spec)
        for path, spec in step.decoder.param_specs.items()
        if path[-1] == "weight" and len(spec.shape) > 2
    )
    logits = load.rows * config.vocab_size * _LOGIT_BYTES / model_size(step.mesh)
    return elements * jnp.dtype(step.decoder.dtype).itemsize + logits


def _rows_of_product(engine: EngineLayout, spec: ParamSpec, load: DecodeLoad) -> float:
    """Return how many rows a device multiplies with a layer's matrices."""
    if not spec.of_experts:
        return load.rows
    moe = engine.step.decoder.config.moe
    assert moe is not None
    share = spec.shard_shape(engine.step.mesh)[1] / spec.shape[1]
    return load.rows * _sharing_replicas(engine) * moe.top_k * share


def _row_elements(engine: EngineLayout, spec: ParamSpec) -> int:
    """Return the inputs and outputs of one row."""
    *_, outputs, inputs = spec.shard_shape(engine.step.mesh)
    return outputs + inputs * spec.num_inputs // spec.shape[-1]
