"""Paged attention on NVIDIA Hopper: Pallas kernels of the Mosaic GPU backend.

The step's keys and values are first scattered into their pages. Rows that run one token (decode) and longer rows
(prefill) have separate kernels; both load pages by TMA and multiply on the tensor cores (wgmma).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.kv_update.gpu.backend import kv_update
from kernels_pallas.paged_attention.api import AttentionConfig, AttentionMeta, Cache, CacheSpec, writing
from kernels_pallas.paged_attention.common.head_shards import head_major_spec, over_heads
from kernels_pallas.paged_attention.gpu.decode import attend_decode, decode_bytes
from kernels_pallas.paged_attention.gpu.layer import GpuLayer
from kernels_pallas.paged_attention.gpu.prefill import QueryTiles, attend_prefill, padded_group, plan_tiles
from kernels_pallas.paged_attention.gpu.tile import HOPPER_SMEM_BYTES, Tile, choose_tile
from kernels_pallas.paged_attention.gpu.work import DecodeWork, plan_decode
from kernels_pallas.shards import model_size
from kernels_pallas.warpgroup import WARPGROUP_ROWS

_CACHE_DTYPES = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8)
_PAGE_SIZES = (16, 32, 64, 128, 256)


class GpuPlan(NamedTuple):
    """Work of one step.

    Attributes:
        meta: metadata of the step.
        tiles: query tiles of the rows that run several tokens; None if the shapes rule such rows out.
        work: key blocks of the rows that run one token; None if all rows count as longer ones.
    """

    meta: AttentionMeta
    tiles: QueryTiles | None
    work: DecodeWork | None


class GpuAttention:
    """Backend `gpu`. Heads are split over the devices of a replica; each shard attends independently."""

    def __init__(
        self,
        config: AttentionConfig,
        mesh: Mesh,
        *,
        num_cores: int = 132,
        smem_bytes: int = HOPPER_SMEM_BYTES,
        tiles: tuple[Tile, Tile] | None = None,
        interpret: Any = False,
    ) -> None:
        """Check that the kernels support `config`, and choose their tiles.

        Args:
            config: config of the model.
            mesh: mesh of the devices.
            num_cores: number of SMs of the device.
            smem_bytes: shared memory that a thread block may use.
            tiles: tiles for decode and prefill, instead of those chosen for the device.
            interpret: parameters of the GPU interpret mode, or False to compile.

        Raises:
            NotImplementedError: the kernels do not support `config`; the message gives the reason.
        """
        if config.dtype not in _CACHE_DTYPES:
            raise NotImplementedError(
                f"a cache of {jnp.dtype(config.dtype)}: Hopper's tensor cores multiply float32 only as TF32, with 10 "
                f"bits of mantissa; use one of {[jnp.dtype(dtype).name for dtype in _CACHE_DTYPES]}"
            )
        if config.page_size not in _PAGE_SIZES:
            raise NotImplementedError(f"pages of {config.page_size} tokens: use one of {_PAGE_SIZES}")
        self.config = config
        self.max_table_entries: int | None = None
        self._mesh = mesh
        self._num_cores = num_cores
        self._interpret = interpret
        self._decode_tile, self._prefill_tile = tiles or (
            choose_tile(config, decode=True, smem_bytes=smem_bytes),
            choose_tile(config, decode=False, smem_bytes=smem_bytes),
        )
        # A tile holds all query heads of a key head if they fit. Otherwise each of several passes handles some of them
        # and reads the keys again.
        group = config.num_q_heads // config.num_kv_heads
        self._num_passes = math.ceil(group / WARPGROUP_ROWS)
        if group % self._num_passes:
            raise NotImplementedError(f"{group} query heads per key head do not divide into {self._num_passes} tiles")
        self._group = padded_group(config.num_q_heads // self._num_passes, config.num_kv_heads)

    def cache_spec(self) -> dict[str, CacheSpec]:
        """Return the specs of separate keys and values in head-major pages: one TMA copy loads a head's page."""
        return head_major_spec(self.config)

    def unpack(self, arrays: Cache) -> tuple[jax.Array, ...]:
        """Return the arrays as they are: keys and values are stored separately."""
        return tuple(arrays.values())

    def pack(self, k: jax.Array, v: jax.Array) -> Cache:
        """The inverse of `unpack`."""
        return {name: self.config.to_cache(x) for name, x in zip(self.cache_spec(), (k, v), strict=False)}

    def writer(self) -> "GpuAttention":
        """See `AttentionBackend.writer`."""
        tiles = self._decode_tile, self._prefill_tile
        return GpuAttention(
            writing(self.config), self._mesh, num_cores=self._num_cores, tiles=tiles, interpret=self._interpret
        )

    def plan(self, meta: AttentionMeta) -> GpuPlan:
        """Find the rows of each query tile."""
        if self.config.batch_invariant:
            # The two kernels round differently, so all rows use the prefill kernel. There, key blocks that a row does
            # not see leave its state exactly unchanged, so that its result depends on that row alone.
            meta = meta._replace(distribution_2=meta.distribution_2.at[0].set(0))
            return GpuPlan(meta, plan_tiles(meta, self._prefill_tile.rows // self._group), None)
        work = self._work(meta.kv_lens_B, meta.distribution_2[0])
        if meta.positions_T.shape == meta.kv_lens_B.shape:
            return GpuPlan(meta, None, work)
        return GpuPlan(meta, plan_tiles(meta, self._prefill_tile.rows // self._group), work)

    def attend(
        self,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
        plan: GpuPlan,
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
        plan: GpuPlan,
        sinks_N: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        c, meta = self.config, plan.meta
        # The kernels compute the layer's first page, which would take a launch.
        layer = layer.astype(jnp.int32)
        new = list(self.pack(k_TKH, v_TKH).values())
        pages = kv_update(new, list(cache.values()), meta.slot_mapping_T, layer, c.num_pages, self._interpret)
        cache = dict(zip(cache, pages, strict=True))
        attended = GpuLayer(cache["k"], cache.get("v"), layer, meta, sinks_N)
        if self._num_passes == 1:
            return self._attend_pages(q_TNH, attended, plan), cache
        num_tokens, num_heads, head_dim = q_TNH.shape
        shape = (attended.num_kv_heads, self._num_passes, -1)
        q_TKAGH = q_TNH.reshape(num_tokens, *shape, head_dim)
        sinks_KAG = None if sinks_N is None else sinks_N.reshape(shape)
        passes = [
            self._attend_pages(
                q_TKAGH[:, :, part].reshape(num_tokens, -1, head_dim),
                attended._replace(sinks_N=None if sinks_KAG is None else sinks_KAG[:, part].reshape(-1)),
                plan,
            )
            for part in range(self._num_passes)
        ]
        o_ATKGH = jnp.stack([each.reshape(num_tokens, shape[0], -1, c.out_dim) for each in passes])
        return o_ATKGH.transpose(1, 2, 0, 3, 4).reshape(num_tokens, num_heads, c.out_dim), cache

    def _attend_pages(self, q_TNH: jax.Array, layer: GpuLayer, plan: GpuPlan) -> jax.Array:
        """Attend the keys and values in the pages; a tile must hold the query heads of a key head."""
        if plan.tiles is None:
            return self._decode(q_TNH, layer, plan.work)
        o_TNH = attend_prefill(self.config, self._prefill_tile, q_TNH, layer, plan.tiles, self._interpret)
        o_TNH = o_TNH.astype(q_TNH.dtype)
        if plan.work is None:
            return o_TNH
        num_rows = min(q_TNH.shape[0], plan.meta.kv_lens_B.shape[0])
        o_BNH = self._decode(q_TNH[:num_rows], layer, plan.work)
        live_B = jnp.arange(num_rows) < plan.meta.distribution_2[0]
        return o_TNH.at[:num_rows].set(jnp.where(live_B[:, None, None], o_BNH, o_TNH[:num_rows]))

    def _decode(self, q_BNH: jax.Array, layer: GpuLayer, work: DecodeWork | None) -> jax.Array:
        """See `attend_decode`."""
        assert work is not None
        o_BNH = attend_decode(self.config, self._decode_tile, work, q_BNH, layer, self._interpret)
        return o_BNH.astype(q_BNH.dtype)

    def _work(self, kv_lens_B: jax.Array, num_single: jax.Array | int) -> DecodeWork:
        """See `plan_decode`."""
        sizes = {"num_kv_heads": self.config.num_kv_heads // model_size(self._mesh), "num_cores": self._num_cores}
        return plan_decode(self.config, self._decode_tile, kv_lens_B, num_single, **sizes)

    def decode_bytes(self, kv_lens: list[int], num_rows: int) -> int:
        """See `AttentionBackend.decode_bytes`."""
        local = self.config.split(model_size(self._mesh))
        kv_lens_B = jnp.asarray([*kv_lens, *[0] * (num_rows - len(kv_lens))], jnp.int32)
        work = self._work(kv_lens_B, len(kv_lens))
        return self._num_passes * decode_bytes(local, self._decode_tile, kv_lens, work)
