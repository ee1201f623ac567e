"""Ragged paged attention for TPU (Pallas Mosaic).

One kernel serves two shapes of work: rows that run one token (decode), and blocks of consecutive tokens of one or more
longer rows (prefill). It writes the step's keys and values and attends, with an online softmax as in FlashAttention
(arXiv:2205.14135) over double-buffered pages.

Memory traffic of a decode step, per layer: every page that a row sees, once, and per row one written tile of tokens, a
query and an output. FLOPs: 4 * N * H per pair of a query token and a key in the buffers that it sees.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta, Cache, CacheSpec, writing
from kernels_pallas.paged_attention.common.head_shards import PAGES_PARTITION, over_heads
from kernels_pallas.paged_attention.common.token_blocks import rows_of_blocks
from kernels_pallas.paged_attention.tpu.kernel import AttentionKernel, Refs
from kernels_pallas.paged_attention.tpu.layout import LANES, TpuLayout
from kernels_pallas.paged_attention.tpu.schedule import (
    ONE_CORE,
    CoreShares,
    KernelShape,
    Scalars,
    decode_bytes,
    share_cores,
)
from kernels_pallas.paged_attention.tpu.tuning import VMEM_FRACTION, TpuTiles, choose_tpu_tiles
from kernels_pallas.pallas import TpuChip, pl, pltpu
from kernels_pallas.shards import model_size

# Tokens of a bf16 tile.
_MIN_PAGE_SIZE = 16


class TpuPlan(NamedTuple):
    """Metadata that the layers of a step share.

    Attributes:
        meta: metadata of the step.
        blocks_2C: i32, first and end of the rows in each block of tokens; None where all rows run one token.
    """

    meta: AttentionMeta
    blocks_2C: jax.Array | None


class TpuAttention:
    """Backend `tpu`. Heads are split over the devices of a replica; each shard attends independently.

    Args:
        config: config of the whole model.
        mesh: mesh of the devices.
        chip: memory sizes and cores of the chip.
        tiles: tiles instead of those that `choose_tpu_tiles` chooses.
        interpret: `pltpu.InterpretParams` to run the kernel on a CPU, or False.

    Raises:
        NotImplementedError: the kernel does not support `config`.
    """

    def __init__(
        self,
        config: AttentionConfig,
        mesh: Mesh,
        chip: TpuChip,
        *,
        tiles: TpuTiles | None = None,
        interpret: Any = False,
    ) -> None:
        self.config = config
        # The page table, of 4-byte entries, may use half of SMEM; the other half is for the other scalars.
        self.max_table_entries: int | None = chip.smem_bytes // 2 // 4
        self._layout = TpuLayout.of(config)
        _check(config)
        shard = config.split(model_size(mesh))
        self._tiles = tiles or choose_tpu_tiles(shard, self._layout, chip.vmem_bytes)
        self._chip = chip
        self._mesh = mesh
        self._interpret = interpret

    def cache_spec(self) -> dict[str, CacheSpec]:
        """See `TpuLayout`."""
        c = self.config
        shape = (c.num_layers * c.num_pages, c.num_kv_heads, c.page_size, self._layout.lanes)
        return {"kv": CacheSpec(shape, c.dtype, PAGES_PARTITION)}

    def unpack(self, arrays: Cache) -> tuple[jax.Array, ...]:
        """See `TpuLayout`."""
        both = self._layout.unpack(arrays["kv"])
        return both if self.config.value_dim is None else both[:1]

    def pack(self, k: jax.Array, v: jax.Array) -> Cache:
        """See `TpuLayout`."""
        return {"kv": self._layout.pack(self.config.to_cache(k), self.config.to_cache(v))}

    def writer(self) -> "TpuAttention":
        """See `AttentionBackend.writer`."""
        return TpuAttention(writing(self.config), self._mesh, self._chip, interpret=self._interpret)

    def plan(self, meta: AttentionMeta) -> TpuPlan:
        """Find the rows of each block."""
        # The result of a one-token row is rounded differently alone and in a block: batch-invariant mode uses blocks
        # only.
        if self.config.batch_invariant:
            return TpuPlan(meta, rows_of_blocks(meta, self._tiles.block_tokens, jnp.int32(0)))
        if meta.positions_T.shape[0] == meta.kv_lens_B.shape[0]:
            return TpuPlan(meta, None)
        return TpuPlan(meta, rows_of_blocks(meta, self._tiles.block_tokens, meta.distribution_2[0]))

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
        plan: TpuPlan,
        sinks_N: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """See `AttentionBackend.attend`."""
        return over_heads(self._attend_shard, self._mesh, cache)(q_TNH, k_TKH, v_TKH, cache, layer, plan, sinks_N)

    def _attend_shard(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
        plan: TpuPlan,
        sinks_N: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        config = self.config
        kv_TKZ = self.pack(k_TKH, v_TKH)["kv"]
        q_TNZ = self._layout.pad_queries(q_TNH.astype(config.compute_dtype))
        meta, first_page = plan.meta, layer * config.num_pages
        call = partial(self._call, meta=meta, first_page=first_page, sinks_N=sinks_N)
        if config.batch_invariant:
            o_TNZ, pages = call(q_TNZ, kv_TKZ, cache["kv"], blocks_2C=plan.blocks_2C)
            return self._layout.results(o_TNZ).astype(q_TNH.dtype), {"kv": pages}
        num_rows, num_tokens = meta.kv_lens_B.shape[0], q_TNH.shape[0]
        # Token b belongs to row b where rows run one token. The blocks of other rows are not visited, and their outputs
        # are undefined.
        decoded_BNZ, pages = call(q_TNZ[:num_rows], kv_TKZ[:num_rows], cache["kv"], blocks_2C=None)
        decoded_TNZ = jnp.pad(decoded_BNZ, ((0, num_tokens - num_rows), (0, 0), (0, 0)))
        o_TNZ = jnp.zeros_like(decoded_TNZ)
        if plan.blocks_2C is not None:
            o_TNZ, pages = call(q_TNZ, kv_TKZ, pages, blocks_2C=plan.blocks_2C)
        is_single_T = jnp.arange(num_tokens) < meta.distribution_2[0]
        o_TNZ = jnp.where(is_single_T[:, None, None], decoded_TNZ, o_TNZ)
        return self._layout.results(o_TNZ).astype(q_TNH.dtype), {"kv": pages}

    def decode_bytes(self, kv_lens: list[int], num_rows: int) -> int:
        """See `AttentionBackend.decode_bytes`."""
        del num_rows
        return decode_bytes(self._shape(1), kv_lens)

    def _shape(self, block_tokens: int, pages_per_row: int = 0, cores: CoreShares = ONE_CORE) -> KernelShape:
        local = self.config.split(model_size(self._mesh))
        return KernelShape(
            config=local.split(cores.num_cores) if cores.of_heads else local,
            layout=self._layout,
            block_tokens=block_tokens,
            pages_per_buffer=self._tiles.pages_per_buffer,
            num_table_entries=pages_per_row,
            cores=cores,
        )

    def _call(
        self,
        q_TNZ: jax.Array,
        kv_TKZ: jax.Array,
        pages_PKSZ: jax.Array,
        *,
        meta: AttentionMeta,
        first_page: jax.Array,
        sinks_N: jax.Array | None,
        blocks_2C: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Call the kernel once; without `blocks_2C` the blocks are the rows that run one token."""
        num_kv_heads = self.config.split(model_size(self._mesh)).num_kv_heads
        num_rows = meta.kv_lens_B.shape[0] if blocks_2C is None else None
        cores = share_cores(self._chip.num_cores, num_kv_heads, num_rows=num_rows)
        block_tokens = 1 if blocks_2C is None else self._tiles.block_tokens
        shape = self._shape(block_tokens, meta.page_table_BM.shape[1], cores)
        scalars = Scalars(
            first_page_1=first_page[None],
            kv_lens_B=meta.kv_lens_B,
            cu_q_lens_B1=meta.cu_q_lens_B1,
            page_table_F=meta.page_table_BM.reshape(-1),
            block_rows_2C=jnp.stack([0, meta.distribution_2[0]])[:, None] if blocks_2C is None else blocks_2C,
        )
        q_CKQZ = _to_blocks(q_TNZ, shape.block_tokens, num_kv_heads)
        operands = {"q": q_CKQZ, "new": _to_blocks(kv_TKZ, shape.block_tokens, num_kv_heads)}
        if sinks_N is not None:
            operands["sinks"] = jnp.tile(sinks_N.reshape(num_kv_heads, -1), (1, shape.block_tokens))[:, :, None]
        num_blocks = q_CKQZ.shape[0]
        # A grid must not be empty: without rows that run one token, every core has a program that does nothing.
        num_live = jnp.maximum(meta.distribution_2[0], 1) if blocks_2C is None else num_blocks
        call = self._pallas_call(shape, (cores.num_cores, pl.cdiv(num_live, cores.stride)), operands)
        o_CKQZ, pages_PKSZ = call(*scalars, *operands.values(), pages_PKSZ)
        return _from_blocks(o_CKQZ, shape.block_tokens)[: q_TNZ.shape[0]], pages_PKSZ

    def _pallas_call(self, shape: KernelShape, grid: tuple[Any, ...], operands: dict[str, jax.Array]) -> Any:
        """Build the kernel call over all blocks; it takes scalars, operands and pages, returns outputs and pages."""
        config, layout, cores = shape.config, shape.layout, shape.cores
        num_heads, rows, num_blocks = config.num_kv_heads, shape.block_rows, operands["q"].shape[0]
        num_scalars = len(Scalars._fields)
        names = [*operands, "old_pages", "o", "pages"]
        names += ["keys", "stage", "row_max", "row_sum", "out", "fetched", "written", "slot"]

        def kernel(*refs: Any) -> None:
            named = {"sinks": None} | dict(zip(names, refs[num_scalars:], strict=True))
            del named["old_pages"]  # the same memory as `pages`
            AttentionKernel(shape, Scalars(*refs[:num_scalars]), Refs(**named)).run()

        def place(core: Any, index: Any, *_: Any) -> tuple[Any, ...]:
            index = cores.block(core, index)
            # Where rows do not divide evenly, a core stays at its last one, which costs no copies.
            return jnp.where(index < num_blocks, index, index - cores.stride), core if cores.of_heads else 0, 0, 0

        def block(*dims: int) -> pl.BlockSpec:
            return pl.BlockSpec((1, num_heads, *dims), place)

        specs = {
            "q": block(rows, layout.query_lanes),
            "new": block(shape.block_tokens, layout.lanes),
            "sinks": pl.BlockSpec((num_heads, rows, 1), lambda *at: place(*at)[1:]),
        }
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        pages = jax.ShapeDtypeStruct(
            (config.num_layers * config.num_pages, operands["q"].shape[1], config.page_size, layout.lanes), config.dtype
        )
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=num_scalars,
                grid=grid,
                in_specs=[*(specs[name] for name in operands), anywhere],
                out_specs=[block(rows, layout.result_lanes), anywhere],
                scratch_shapes=[
                    pltpu.VMEM((2, shape.pages_per_buffer, num_heads, *pages.shape[2:]), config.dtype),
                    pltpu.VMEM((num_heads, shape.stage_tokens, layout.lanes), config.dtype),
                    pltpu.VMEM((num_heads, rows, LANES), jnp.float32),
                    pltpu.VMEM((num_heads, rows, LANES), jnp.float32),
                    pltpu.VMEM((num_heads, rows, layout.result_lanes), jnp.float32),
                    pltpu.SemaphoreType.DMA((2,)),
                    pltpu.SemaphoreType.DMA,
                    pltpu.SMEM((1,), jnp.int32),
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct((*operands["q"].shape[:3], layout.result_lanes), operands["q"].dtype),
                pages,
            ],
            input_output_aliases={num_scalars + len(operands): 1},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel" if cores.num_cores > 1 else "arbitrary", "arbitrary"),
                vmem_limit_bytes=int(self._chip.vmem_bytes * VMEM_FRACTION),
            ),
            interpret=self._interpret,
            name="paged_decode" if shape.fused_write else "paged_prefill",
        )


def _to_blocks(x_TNZ: jax.Array, block_tokens: int, num_kv_heads: int) -> jax.Array:
    """[T, K * G, Z] -> [C, K, W * G, Z]; the last block is padded with zeros."""
    x_TNZ = jnp.pad(x_TNZ, ((0, -x_TNZ.shape[0] % block_tokens), (0, 0), (0, 0)))
    x_CWKGZ = x_TNZ.reshape(-1, block_tokens, num_kv_heads, x_TNZ.shape[1] // num_kv_heads, x_TNZ.shape[2])
    x_CKWGZ = jnp.moveaxis(x_CWKGZ, 2, 1)
    return x_CKWGZ.reshape(*x_CKWGZ.shape[:2], -1, x_TNZ.shape[2])


def _from_blocks(x_CKQZ: jax.Array, block_tokens: int) -> jax.Array:
    """The inverse of `_to_blocks`, except that the padding stays."""
    num_blocks, num_kv_heads, _, lanes = x_CKQZ.shape
    x_CKWGZ = x_CKQZ.reshape(num_blocks, num_kv_heads, block_tokens, -1, lanes)
    return jnp.moveaxis(x_CKWGZ, 1, 2).reshape(num_blocks * block_tokens, -1, lanes)


def _check(config: AttentionConfig) -> None:
    if config.dtype == jnp.float16:
        raise NotImplementedError("the TPU kernel does not support float16, which the MXU lacks")
    if config.page_size % _MIN_PAGE_SIZE:
        raise NotImplementedError(
            f"the TPU kernel needs pages of a multiple of {_MIN_PAGE_SIZE} tokens, got {config.page_size}"
        )
