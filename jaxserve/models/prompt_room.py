"""Prompts of latent attention over expanded keys (arXiv:2405.04434, section 2.1.2, the form that is trained).

Over what is cached as it is, a query meets 576 numbers of a key and 512 of a value, for each head; over keys and values
of the head's own, 128 + 64 and 128. Long prompts are cheaper so, though the latent vectors they see have to be expanded
in every layer. Where a step's prompts see no more than fits, that is done: their pages are expanded into a room that a
layer leaves to the next, with pages of its own, and attended over there by the backend for such heads. Rows that run a
single token stay with what is cached.

Dimension key: see `latent_attention`; E numbers of a key or a value in the room, P pages of the room.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxserve.config import LatentConfig, ModelConfig
from jaxserve.models.attend import OverCache
from jaxserve.models.cache_scales import cache_scales_of
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionMeta, Cache, Plan
from kernels_pallas.paged_attention.head_shards import PAGES_PARTITION
from kernels_pallas.paged_attention.xla_pages import expand
from kernels_pallas.shards import MODEL, over_model

# Latent vectors that are expanded at a time.
_TOKENS_AT_ONCE = 1024
_ROW_MAJOR = Layout((0, 1, 2, 3))
# What is expanded is written, too, and read again: on CPU that takes as long as its arithmetic (scripts/bench).
_MEMORY_FACTOR = 2


@dataclasses.dataclass(frozen=True)
class PromptRoom:
    """What a model expands its prompts with.

    Attributes:
        latent: sizes of the model.
        backend: attends over the room, whose pages are those of its only layer.
        writer: of the cache; its results count for nothing.
        mesh: of the devices.
    """

    latent: LatentConfig
    backend: AttentionBackend
    writer: AttentionBackend
    mesh: Mesh

    @property
    def num_tokens(self) -> int:
        """Of sequences, that a step's prompts may have together."""
        return self.backend.config.num_pages * self.backend.config.page_size

    @property
    def fewest_tokens(self) -> float:
        """Steps of fewer are never cheaper so."""
        return self._expansion_flops / self._saved_a_pair if self._saved_a_pair > 0 else math.inf

    def saved_flops(self, rows: Iterable[tuple[int, int]]) -> float:
        """What a step saves with its prompts in the room, as arithmetic of a layer and head; -inf: they do not fit.

        Args:
            rows: (tokens that run, tokens of the sequence with them) of the rows that run several tokens.
        """
        page_size = self.backend.config.page_size
        num_pages, saved = 0, 0.0
        for num_tokens, length in rows:
            num_pages += -(-length // page_size)
            pairs = num_tokens * length - num_tokens * (num_tokens - 1) / 2
            saved += pairs * self._saved_a_pair - length * self._expansion_flops
        return saved if num_pages <= self.backend.config.num_pages else -math.inf

    @property
    def _saved_a_pair(self) -> int:
        """Of a query, key and head: what is left where both are as wide as in the room."""
        return 2 * (2 * self.latent.kv_rank + self.latent.rope_dim) - 4 * self.backend.config.head_dim

    @property
    def _expansion_flops(self) -> int:
        """Of a key and head. A step's own keys take what absorbing its queries and results would, besides."""
        return _MEMORY_FACTOR * 2 * self.latent.kv_rank * (self.latent.key_dim + self.latent.value_dim)

    def expand(self, x_PKSC: jax.Array, matrices: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Keys and values [P, N, S, E] of what is cached, [P, K, S, C + R].

        Args:
            x_PKSC: of each key head, all the same.
            matrices: see `Expansion.by_head`.
        """
        c, num_keys = self.latent, x_PKSC.shape[1]
        keys_KGHC, values_KGVC = (each.reshape(num_keys, -1, *each.shape[1:]) for each in matrices)
        latent_PKSC, k_PKSR = x_PKSC[..., : c.kv_rank], x_PKSC[..., c.kv_rank :]
        k_PKGSH = jnp.einsum("pksc,kghc->pkgsh", latent_PKSC, keys_KGHC)
        v_PKGSV = jnp.einsum("pksc,kgvc->pkgsv", latent_PKSC, values_KGVC)
        k_PKGSR = jnp.broadcast_to(k_PKSR[:, :, None], (*k_PKGSH.shape[:-1], c.rope_dim))
        both = jnp.concatenate([k_PKGSH, k_PKGSR], axis=-1), v_PKGSV
        k_PKGSE, v_PKGSE = (_filled_up(x, self.backend.config.head_dim) for x in both)
        by_head = (x_PKSC.shape[0], -1, *k_PKGSE.shape[-2:])
        return k_PKGSE.reshape(by_head), v_PKGSE.reshape(by_head)

    def plan(self, config: ModelConfig, cached: AttentionBackend, meta: AttentionMeta) -> "ExpandedPrompts":
        """What the layers of a step need.

        Args:
            config: of the model.
            cached: the backend of the cache.
            meta: the step, whose prompts fit the room.
        """
        single, prompts = _single_tokens(meta), _prompts(meta)
        page_size = self.backend.config.page_size
        count_B = -(-prompts.kv_lens_B // page_size)
        first_B = jnp.cumsum(count_B) - count_B
        row_P, index_P, num_live = expand(count_B, self.backend.config.num_pages)
        in_room = _moved(prompts, first_B.astype(jnp.int32), page_size, self.backend.config.num_pages)
        return ExpandedPrompts(
            room=self,
            single=OverCache(config, cached, cached.plan(single)),
            writer=OverCache(config, self.writer, self.writer.plan(meta)),
            prompts=self.backend.plan(in_room),
            pages=_Pages(prompts.page_table_BM[row_P, index_P], num_live),
            num_single=meta.distribution_2[0],
            num_rows=meta.kv_lens_B.shape[0],
        )


class _Pages(NamedTuple):
    """What the room is filled with.

    Attributes:
        page_P: i32, pages of the cache by the room's.
        num_live: i32, pages of the room that are in use.
    """

    page_P: jax.Array
    num_live: jax.Array


class ExpandedPrompts(NamedTuple):
    """A step's prompts in the room; see `Attend`.

    Attributes:
        room: where.
        single: attends the rows that run a single token, over what is cached.
        writer: writes the cache.
        prompts: plan of the others, over the room.
        pages: that are expanded.
        num_single: i32, rows that run a single token; those come first.
        num_rows: of the step.
    """

    room: PromptRoom
    single: OverCache
    writer: OverCache
    prompts: Plan
    pages: "_Pages"
    num_single: jax.Array
    num_rows: int

    def attach(self, attention: Any) -> None:
        """Queries are to stay those of the heads' own keys, and results are values."""
        attention.absorbs = False

    def attend(
        self,
        attention: Any,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """See `Attend.attend`."""
        _, cache = self.writer.attend(attention, k_TKH, k_TKH, v_TKH, cache, layer)
        rows = slice(self.num_rows)
        o_BNC, cache = self.single.attend(
            attention, attention.absorbed(q_TNH[rows]), k_TKH[rows], v_TKH[rows], cache, layer
        )
        o_TNV = self._attend_prompts(attention, q_TNH, k_TKH, cache, layer)
        o_BNV = attention.kv_b_proj.release(o_BNC)
        is_single_B = jnp.arange(self.num_rows) < self.num_single
        return o_TNV.at[rows].set(jnp.where(is_single_B[:, None, None], o_BNV, o_TNV[rows])), cache

    def _attend_prompts(
        self, attention: Any, q_TNH: jax.Array, k_TKH: jax.Array, cache: Cache, layer: jax.Array
    ) -> jax.Array:
        """[T, N, V] over the room."""
        backend, matrices = self.room.backend, attention.kv_b_proj.by_head(q_TNH.dtype)
        scales = cache_scales_of(self.single.config, attention.cache_scales)
        heads = P(MODEL, None, None)
        fill = over_model(
            self._fill,
            self.room.mesh,
            (dict.fromkeys(cache, PAGES_PARTITION), (heads, heads), None if scales is None else P(MODEL, None), P()),
            dict.fromkeys(backend.cache_spec(), PAGES_PARTITION),
        )
        first_page = layer * self.single.backend.config.num_pages
        pages = self.pages._replace(page_P=self.pages.page_P + first_page)
        room = fill(cache, matrices, None if scales is None else scales.keys_KH, pages)
        # The backend writes this step's own: they may be more exact than what is cached.
        k_TNE, v_TNE = (x_TN1E[:, :, 0] for x_TN1E in self.room.expand(k_TKH[:, :, None], matrices))
        q_TNE = _filled_up(q_TNH, backend.config.head_dim)
        o_TNE, _ = backend.attend(q_TNE, k_TNE, v_TNE, room, jnp.int32(0), self.prompts)
        return o_TNE[..., : self.room.latent.value_dim]

    def _fill(
        self, cache: Cache, matrices: tuple[jax.Array, jax.Array], scale_KH: jax.Array | None, pages: _Pages
    ) -> Cache:
        """The room with the pages that are in use, on one shard of the heads."""
        cached, backend = self.single.backend, self.room.backend
        pages_at_once = min(max(1, _TOKENS_AT_ONCE // backend.config.page_size), self.room.backend.config.num_pages)
        num_heads = matrices[0].shape[0]
        room = {
            name: lax.empty((spec.shape[0], num_heads, *spec.shape[2:]), spec.dtype)
            for name, spec in backend.cache_spec().items()
        }

        def body(turn: jax.Array, room: Cache) -> Cache:
            # The last turn is moved back, and expands some pages once more.
            first = jnp.minimum(turn * pages_at_once, self.room.backend.config.num_pages - pages_at_once)
            page_P = lax.dynamic_slice_in_dim(pages.page_P, first, pages_at_once)
            taken = {name: array.at[page_P].get(mode="promise_in_bounds") for name, array in cache.items()}
            (x_PKSC,) = cached.unpack(taken)
            if scale_KH is not None:
                x_PKSC = x_PKSC.astype(jnp.float32) * scale_KH[:, None]
            packed = backend.pack(*self.room.expand(x_PKSC.astype(matrices[0].dtype), matrices))
            # As kernels want pages: TPUs would have the room as the product leaves it, and turn it round whole.
            packed = {name: with_layout_constraint(array, _ROW_MAJOR) for name, array in packed.items()}
            return {
                name: lax.dynamic_update_slice_in_dim(array, packed[name], first, axis=0)
                for name, array in room.items()
            }

        return lax.fori_loop(0, -(-pages.num_live // pages_at_once), body, room)


def _filled_up(x: jax.Array, size: int) -> jax.Array:
    """Zeros after the numbers of the last axis."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),))


def _single_tokens(meta: AttentionMeta) -> AttentionMeta:
    """The rows of a step that run a single token, as a step of their own."""
    num_single = meta.distribution_2[0]
    row_B = jnp.arange(meta.kv_lens_B.shape[0])
    return meta._replace(
        kv_lens_B=jnp.where(row_B < num_single, meta.kv_lens_B, 0),
        cu_q_lens_B1=jnp.minimum(meta.cu_q_lens_B1, num_single),
        distribution_2=jnp.stack([num_single, num_single]),
        slot_mapping_T=jnp.where(row_B < num_single, meta.slot_mapping_T[row_B], jnp.iinfo(jnp.int32).max),
        positions_T=meta.positions_T[row_B],
    )


def _prompts(meta: AttentionMeta) -> AttentionMeta:
    """The other rows alone; their tokens stay where they are."""
    num_rows, (num_single, num_live) = meta.kv_lens_B.shape[0], meta.distribution_2
    row_B = jnp.arange(num_rows) + num_single
    taken_B = jnp.minimum(row_B, num_rows - 1)
    return meta._replace(
        kv_lens_B=jnp.where(row_B < num_live, meta.kv_lens_B[taken_B], 0),
        page_table_BM=meta.page_table_BM[taken_B],
        cu_q_lens_B1=meta.cu_q_lens_B1[jnp.minimum(jnp.arange(num_rows + 1) + num_single, num_rows)],
        distribution_2=jnp.stack([jnp.zeros_like(num_single), num_live - num_single]),
    )


def _moved(meta: AttentionMeta, first_B: jax.Array, page_size: int, num_pages: int) -> AttentionMeta:
    """Rows whose pages lie one after the other, those of each from `first_B` on."""
    length = min(meta.page_table_BM.shape[1], num_pages)
    token_T = jnp.arange(meta.positions_T.shape[0])
    row_T = jnp.searchsorted(meta.cu_q_lens_B1[1:], token_T, side="right", method="compare_all")
    is_live_T = (token_T >= meta.cu_q_lens_B1[0]) & (row_T < meta.distribution_2[1])
    first_T = first_B[jnp.minimum(row_T, first_B.shape[0] - 1)]
    return meta._replace(
        page_table_BM=jnp.minimum(first_B[:, None] + jnp.arange(length, dtype=jnp.int32), num_pages - 1),
        slot_mapping_T=jnp.where(is_live_T, first_T * page_size + meta.positions_T, jnp.iinfo(jnp.int32).max),
    )
