"""Calls of kernels at a model's sizes, to be timed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.device_check.kernels import Kernels
from jaxserve.device_check.specs import AttentionSpec, KernelSpecs
from kernels_pallas.grouped_matmul.api import ExpertShape, Matrices
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionConfig, AttentionMeta, Cache
from kernels_pallas.sampling.api import SamplingMode
from kernels_pallas.sampling.cases import Case as SamplingStep
from kernels_pallas.sampling.cases import RowParams, Sample
from kernels_pallas.sampling.common.summary import Shard
from kernels_pallas.token_tiles import sort_into_blocks

_ROWS = (1, 8, 32, 128, 256)
_CONTEXTS = (128, 2048, 32768)
_PROMPTS = (512, 2048, 8192)
_QUICK = {(8, 2048), (256, 2048), (1, 32768)}
_QUICK_ROWS, _QUICK_PROMPT = (8, 256), 2048
# Keys and values of one layer that a case may have.
_MAX_CACHE_BYTES = 4 << 30
_LOGIT_BYTES = 4


class Timed(NamedTuple):
    """A call to time.

    Attributes:
        run: returns the first argument, changed by the result, so that calls in a loop depend on each other.
        varying: the first argument, which is donated.
        constants: the other arguments.
        num_bytes, num_flops: what the kernel moves and computes.
    """

    run: Callable[..., Any]
    varying: Any
    constants: tuple[Any, ...]
    num_bytes: float
    num_flops: float


class SpeedCase(NamedTuple):
    """A call to time, which is built when it is its turn."""

    op: str
    name: str
    quick: bool
    make: Callable[[Kernels], Timed]


def speed_cases(specs: KernelSpecs) -> Iterator[SpeedCase]:
    """Yield the calls for a model."""
    yield from _decode(specs.attention, specs.max_rows)
    yield from _prefill(specs.attention)
    for name, shape in specs.linears.items():
        yield from _products(name, shape, 1, 1)
    if specs.experts is not None:
        for shape in specs.experts.shapes:
            name = f"experts of {shape.num_outputs} x {shape.num_inputs}"
            yield from _products(name, shape, specs.experts.num_experts, specs.experts.top_k)
    yield from _sampling(specs)


def _decode(spec: AttentionSpec, max_rows: int) -> Iterator[SpeedCase]:
    shapes = {(rows, context): [context] * rows for rows in _ROWS for context in _CONTEXTS}
    shapes[(max_rows, 0)] = [min(_CONTEXTS[-1], spec.context_length), *[_CONTEXTS[0]] * (max_rows - 1)]
    for (rows, context), kv_lens in shapes.items():
        if rows > max_rows or context > spec.context_length or _cache_bytes(spec, kv_lens) > _MAX_CACHE_BYTES:
            continue
        name = f"decode, {rows} rows of {context} keys" if context else f"decode, one long row among {rows}"

        def make(kernels: Kernels, kv_lens: list[int] = kv_lens) -> Timed:
            return time_attention(kernels.attention(attention_config(spec, kv_lens)), [1] * len(kv_lens), kv_lens)

        yield SpeedCase("paged_attention", name, (rows, context) in _QUICK, make)


def _prefill(spec: AttentionSpec) -> Iterator[SpeedCase]:
    for tokens in _PROMPTS:
        if tokens > spec.context_length:
            continue

        def make(kernels: Kernels, tokens: int = tokens) -> Timed:
            return time_attention(kernels.attention(attention_config(spec, [tokens])), [tokens], [tokens])

        yield SpeedCase("paged_attention", f"prompt of {tokens} tokens", tokens == _QUICK_PROMPT, make)


def _cache_bytes(spec: AttentionSpec, kv_lens: Sequence[int]) -> int:
    """Return the bytes of the cache of one layer."""
    _, num_kv_heads, head_dim = spec.heads
    pages = sum(-(-length // spec.page_size) for length in kv_lens)
    return 2 * pages * spec.page_size * num_kv_heads * head_dim * jnp.dtype(spec.dtype).itemsize


def attention_config(spec: AttentionSpec, kv_lens: Sequence[int]) -> AttentionConfig:
    """Return the config of one layer whose cache holds the rows."""
    num_q_heads, num_kv_heads, head_dim = spec.heads
    return AttentionConfig(
        num_layers=1,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=spec.page_size,
        num_pages=sum(-(-length // spec.page_size) for length in kv_lens),
        dtype=spec.dtype,
        scale=head_dim**-0.5,
        window=None if None in spec.windows else spec.windows[0],
        value_dim=spec.value_dim,
    )


def time_attention(backend: AttentionBackend, q_lens: list[int], kv_lens: list[int]) -> Timed:
    """Return a step of one layer, with keys and values of 1 in shuffled pages."""
    config = backend.config
    num_rows = max(8, 1 << (len(q_lens) - 1).bit_length())
    num_tokens = num_rows if max(q_lens) == 1 else sum(q_lens)
    meta = _meta(config, q_lens, kv_lens, num_rows, num_tokens)
    cache = {name: jnp.ones(spec.shape, spec.dtype) for name, spec in backend.cache_spec().items()}
    shapes = [(num_tokens, heads, config.head_dim) for heads in (config.num_q_heads, *[config.num_kv_heads] * 2)]
    q, k, v = (jnp.ones(shape, config.compute_dtype) for shape in shapes)

    def run(varying: tuple[jax.Array, Cache], k: jax.Array, v: jax.Array, meta: AttentionMeta) -> tuple[Any, Any]:
        q, cache = varying
        out, cache = backend.attend(q, k, v, cache, jnp.int32(0), backend.plan(meta))
        return _after(q, out), cache

    single = max(q_lens) == 1
    pairs = sum(q_len * (kv_len - (q_len - 1) / 2) for q_len, kv_len in zip(q_lens, kv_lens, strict=True))
    flops = 2 * config.num_q_heads * (config.head_dim + config.out_dim) * pairs
    num_bytes = backend.decode_bytes(kv_lens, num_rows) if single else sum(x.nbytes for x in (q, q, k, v))
    return Timed(run, (q, cache), (k, v, meta), num_bytes, flops)


def _meta(
    config: AttentionConfig, q_lens: list[int], kv_lens: list[int], num_rows: int, num_tokens: int
) -> AttentionMeta:
    count, size = len(q_lens), config.page_size
    pages = [-(-length // size) for length in kv_lens]
    table_BM = np.zeros((num_rows, max(pages)), np.int32)
    shuffled = iter(np.random.default_rng(0).permutation(config.num_pages).tolist())
    slots: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        table_BM[row, : pages[row]] = [next(shuffled) for _ in range(pages[row])]
        positions.append(np.arange(kv_len - q_len, kv_len))
        slots.append(table_BM[row, positions[-1] // size] * size + positions[-1] % size)
    padding = num_tokens - sum(q_lens)
    ends_B1 = np.zeros(num_rows + 1, np.int32)
    ends_B1[1:] = sum(q_lens)
    ends_B1[1 : count + 1] = np.cumsum(q_lens)
    single = sum(length == 1 for length in q_lens)
    arrays = (
        np.pad(np.array(kv_lens, np.int32), (0, num_rows - count)),
        table_BM,
        ends_B1,
        np.array([single, count], np.int32),
        np.pad(np.concatenate(slots), (0, padding), constant_values=config.num_pages * size).astype(np.int32),
        np.pad(np.concatenate(positions), (0, padding)).astype(np.int32),
    )
    return AttentionMeta(*map(jnp.asarray, arrays))


def _products(name: str, shape: ExpertShape, num_groups: int, top_k: int) -> Iterator[SpeedCase]:
    for rows in (*_ROWS, _QUICK_PROMPT):

        def make(kernels: Kernels, rows: int = rows) -> Timed:
            return time_products(kernels, shape, num_groups, rows * top_k)

        yield SpeedCase("grouped_matmul", f"{name}, {rows} tokens", rows in _QUICK_ROWS, make)


def time_products(kernels: Kernels, shape: ExpertShape, num_groups: int, num_rows: int) -> Timed:
    """Return rows, spread evenly over groups, times their matrices."""
    matmul = kernels.grouped_matmul(shape)
    if num_groups == 1 and shape.format is None and not matmul.max_dense_rows:
        raise NotImplementedError("XLA multiplies by these matrices")
    group_R = np.random.default_rng(0).integers(0, num_groups, num_rows).astype(np.int32)
    x_RI = jnp.ones((num_rows, shape.num_inputs), shape.rows_dtype)
    matrices = _ones(shape, num_groups)
    block_rows = matmul.block_rows(num_rows, num_groups, shape.num_inputs * x_RI.dtype.itemsize)
    # Sorted before, so that only the kernel is timed.
    blocks, permuted = jax.jit(lambda group_R: sort_into_blocks(group_R, num_groups, block_rows))(group_R)

    def run(x_PI: jax.Array, arrays: Any, blocks: Any) -> jax.Array:
        (y_PO,) = matmul(x_PI, [Matrices(*arrays, format=shape.format)], blocks)
        return _after(x_PI, y_PO)

    x_PI = x_RI[permuted.row_P]
    arrays = [array for array in matrices if array is not None]
    used = len(np.unique(group_R)) / num_groups
    moved = used * sum(array.nbytes for array in arrays)
    moved += num_rows * (shape.num_inputs + shape.num_outputs) * x_RI.dtype.itemsize
    return Timed(run, x_PI, (matrices, blocks), moved, 2.0 * num_rows * shape.num_inputs * shape.num_outputs)


def _ones(shape: ExpertShape, number: int) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Return values, scales and zero points of matrices; what is in them makes no difference to the time."""
    format, num_inputs, num_outputs = shape.format, shape.num_inputs, shape.num_outputs
    if format is None:
        sizes = (number, num_inputs, num_outputs) if shape.transposed else (number, num_outputs, num_inputs)
        return jnp.ones(sizes, shape.rows_dtype), None, None
    blocks = (number, -(-num_outputs // format.block[0]), -(-num_inputs // (format.block[1] or num_inputs)))
    values = jnp.ones((number, num_outputs, num_inputs // format.per_byte), format.dtype)
    scale = jnp.ones(blocks, jnp.uint8 if format.element_type == "mxfp4" else jnp.float32)
    return values, scale, jnp.ones(blocks, jnp.uint8) if shape.zeros else None


def _sampling(specs: KernelSpecs) -> Iterator[SpeedCase]:
    kinds = {
        "greedy": (SamplingMode.PLAIN, RowParams(temperature=0)),
        "top-p": (SamplingMode.LISTED, RowParams(seed=1, top_p=0.95)),
    }
    for name, (mode, params) in kinds.items():
        for rows in _ROWS:

            def make(
                kernels: Kernels, mode: SamplingMode = mode, params: RowParams = params, rows: int = rows
            ) -> Timed:
                samples = (Sample(name="", params=params),) * rows
                step = SamplingStep(name="", vocab_size=specs.vocab_size, samples=samples)
                sample, shard = kernels.sampler(), Shard(specs.vocab_size)

                def run(logits_BV: jax.Array, inputs: Any, state: Any) -> jax.Array:
                    out = sample(logits_BV, inputs, state, shard, mode)
                    return _after(logits_BV, out.token_B.astype(jnp.float32))

                num_bytes = _LOGIT_BYTES * rows * specs.vocab_size
                return Timed(run, jnp.asarray(step.logits()), step.arrays(), num_bytes, 0.0)

            yield SpeedCase("sampling", f"{name}, {rows} rows", rows in _QUICK_ROWS, make)


def _after(x: jax.Array, result: jax.Array) -> jax.Array:
    """Return `x` with one element that comes from a result, so that the next call has to wait for it."""
    element = result[(0,) * result.ndim].astype(x.dtype)
    return x.at[(0,) * x.ndim].set(element)
