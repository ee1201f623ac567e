"""Prompts of latent attention over expanded keys (arXiv:2405.04434, section 2.1.2, the form that is trained).

Over what is cached as it is, a query meets 576 numbers of a key and 512 of a value, for each head; over keys and values
of the head's own, 128 + 64 and 128. Long prompts are cheaper so, though the latent vectors they see have to be expanded
in every layer. Where a step's prompts see no more than fits, that is done: in each layer their pages are expanded into
a room, whose pages are those of a backend for such heads. Rows that run a single token stay with what is cached.

Dimension key: see `mla`; Z numbers of what is cached, C + R; E of a key or a value in the room, P pages.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import MlaConfig
from jaxserve.layers.cached_attention import OverCache
from jaxserve.layers.kv_scales import kv_scales_of
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionMeta, Cache, Plan, filled_up
from kernels_pallas.paged_attention.common.page_moves import move_pages
from kernels_pallas.paged_attention.common.step_parts import MovedPages, moved, prompts, single_tokens


class PromptCosts(NamedTuple):
    """Of a step's prompts, as arithmetic of a layer and head.

    Attributes:
        cached: over what is cached as it is.
        expanded: over expanded keys; infinite if they do not fit.
    """

    cached: float
    expanded: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaPrefillWorkspace:
    """What a model expands its prompts with.

    Attributes:
        latent: sizes of the model.
        backend: attends over the room, whose pages are those of its only layer.
        expansion_cost: what expanding takes, of its own arithmetic: what is expanded is written and read, too.
        mesh: of the devices.
    """

    latent: MlaConfig
    backend: AttentionBackend
    expansion_cost: float
    mesh: Mesh

    @property
    def num_tokens(self) -> int:
        """Of sequences, that a step's prompts may have together."""
        return self.backend.config.num_pages * self.backend.config.page_size

    def costs(self, rows: Iterable[tuple[int, int]]) -> PromptCosts:
        """What a step's prompts take in both forms.

        Args:
            rows: (tokens that run, tokens of the sequence with them) of the rows that run several tokens.
        """
        latent, config = self.latent, self.backend.config
        cached_pair = 2 * (2 * latent.kv_rank + latent.rope_dim)
        expanded_pair = 4 * config.head_dim
        # A step's own keys take what absorbing its queries and results would, besides.
        expansion = self.expansion_cost * 2 * latent.kv_rank * (latent.key_dim + latent.value_dim)
        num_pages, cached, expanded = 0, 0.0, 0.0
        for num_tokens, length in rows:
            num_pages += -(-length // config.page_size)
            pairs = num_tokens * length - num_tokens * (num_tokens - 1) / 2
            cached += pairs * cached_pair
            expanded += pairs * expanded_pair + length * expansion
        return PromptCosts(cached, expanded if num_pages <= config.num_pages else math.inf)

    def can_pay(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens are ever cheaper so: they are the more so, the more their sequence has."""
        costs = self.costs([(min(num_tokens, self.num_tokens), self.num_tokens)])
        return costs.expanded < costs.cached

    def expand(self, matrices: tuple[jax.Array, jax.Array], x_PKSZ: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [P, N, S, E] of what is cached.

        Args:
            matrices: see `Expansion.by_head`.
            x_PKSZ: of each key head, all the same.
        """
        latent, size = self.latent, self.backend.config.head_dim
        keys_KGHC, values_KGVC = (each.reshape(x_PKSZ.shape[1], -1, *each.shape[1:]) for each in matrices)
        latent_PKSC, k_PKSR = x_PKSZ[..., : latent.kv_rank], x_PKSZ[..., latent.kv_rank :]
        k_PKGSH = jnp.einsum("pksc,kghc->pkgsh", latent_PKSC, keys_KGHC)
        k_PKGSR = jnp.broadcast_to(k_PKSR[:, :, None], (*k_PKGSH.shape[:-1], latent.rope_dim))
        v_PKGSV = jnp.einsum("pksc,kgvc->pkgsv", latent_PKSC, values_KGVC)
        k_PKGSE = filled_up(jnp.concatenate([k_PKGSH, k_PKGSR], axis=-1), size)
        v_PKGSE = filled_up(v_PKGSV, size)
        by_head = (x_PKSZ.shape[0], -1, *k_PKGSE.shape[-2:])
        return k_PKGSE.reshape(by_head), v_PKGSE.reshape(by_head)

    def plan(self, cached: AttentionBackend, meta: AttentionMeta) -> "ExpandedPrompts":
        """What the layers of a step need.

        Args:
            cached: the backend of the cache.
            meta: the step, whose prompts fit the room.
        """
        here, writer = prompts(meta), cached.writer()
        there, pages = moved(here, self.backend.config.page_size, self.backend.config.num_pages)
        return ExpandedPrompts(
            room=self,
            single=OverCache(cached, cached.plan(single_tokens(meta))),
            writer=OverCache(writer, writer.plan(here)),
            prompts=self.backend.plan(there),
            pages=pages,
            num_single=meta.distribution_2[0],
            num_rows=meta.kv_lens_B.shape[0],
        )


class ExpandedPrompts(NamedTuple):
    """A step's prompts in the room; see `Attend`.

    Attributes:
        room: where.
        single: attends the rows that run a single token, over what is cached.
        writer: writes the others' tokens.
        prompts: plan of those, over the room.
        pages: that are expanded, of a layer.
        num_single: i32, rows that run a single token; those come first.
        num_rows: of the step.
    """

    room: MlaPrefillWorkspace
    single: OverCache
    writer: OverCache
    prompts: Plan
    pages: MovedPages
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
        # Any queries will do.
        _, cache = self.writer.attend(attention, k_TKH, k_TKH, v_TKH, cache, layer)
        rows = slice(self.num_rows)
        q_BNZ = attention.kv_b_proj.absorb(q_TNH[rows])
        o_BNC, cache = self.single.attend(attention, q_BNZ, k_TKH[rows], v_TKH[rows], cache, layer)
        o_TNV = self._attend_prompts(attention, q_TNH, k_TKH, cache, layer)
        o_BNV = attention.kv_b_proj.release(o_BNC)
        is_single_B = jnp.arange(self.num_rows) < self.num_single
        return o_TNV.at[rows].set(jnp.where(is_single_B[:, None, None], o_BNV, o_TNV[rows])), cache

    def _attend_prompts(
        self, attention: Any, q_TNH: jax.Array, k_TKZ: jax.Array, cache: Cache, layer: jax.Array
    ) -> jax.Array:
        """[T, N, V] over the room."""
        room, cached = self.room, self.single.backend
        matrices = attention.kv_b_proj.by_head(q_TNH.dtype)
        scales = kv_scales_of(attention.cache_scales, cached.config.value_dim)
        first_page = layer * cached.config.num_pages
        pages = move_pages(
            self._expand_cached,
            (matrices, None if scales is None else scales.keys_KH),
            (cached, cache),
            room.backend,
            self.pages._replace(page_P=self.pages.page_P + first_page),
            room.mesh,
        )
        # The backend writes this step's own: they may be more exact than what is cached.
        k_TNE, v_TNE = (x_TN1E[:, :, 0] for x_TN1E in room.expand(matrices, k_TKZ[:, :, None]))
        q_TNE = filled_up(q_TNH, room.backend.config.head_dim)
        o_TNE, _ = room.backend.attend(q_TNE, k_TNE, v_TNE, pages, jnp.int32(0), self.prompts)
        return o_TNE[..., : room.latent.value_dim]

    def _expand_cached(
        self, operands: tuple[tuple[jax.Array, jax.Array], jax.Array | None], x_PKSZ: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values of what is cached; operands are the matrices and the cache's factors."""
        matrices, scale_KZ = operands
        if scale_KZ is not None:
            x_PKSZ = x_PKSZ.astype(jnp.float32) * scale_KZ[:, None]
        return self.room.expand(matrices, x_PKSZ.astype(matrices[0].dtype))
