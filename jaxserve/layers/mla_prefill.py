"""MLA prompts in the MHA form: over keys and values of each head (arXiv:2405.04434, section 2.1.2).

In the absorbed form a query meets 576 channels of a key and 512 of a value for each head; over keys and values of the
head's own it meets 128 + 64 and 128. Long prompts are cheaper in the MHA form, although keys and values have to be
computed from the latent vectors they see in every layer. Where the prompts of a step see no more tokens than fit, each
layer computes them into a workspace whose pages are those of an attention backend for plain heads. Rows that run a
single token stay in the absorbed form.

Dimension key: see `mla`; Z cached channels, C + R; E channels of a key or a value in the workspace, P pages.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import MlaConfig
from jaxserve.layers.cached_attention import PagedAttentionCall
from jaxserve.layers.kv_scales import kv_scales_of
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionMeta, Cache, Plan, pad_last_axis
from kernels_pallas.paged_attention.common.page_moves import move_pages
from kernels_pallas.paged_attention.common.split_meta import RemappedPages, decode_meta, prefill_meta, remap_pages


class PrefillCosts(NamedTuple):
    """FLOPs that the prompts of a step take, per layer and head.

    Attributes:
        absorbed: in the absorbed form.
        mha: in the MHA form; infinite where the workspace is too small.
    """

    absorbed: float
    mha: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaPrefillWorkspace:
    """Where prompts get keys and values of each head.

    Attributes:
        mla: sizes of the model's attention.
        backend: the attention backend over the workspace, whose pages are those of its only layer.
        write_cost: what computing keys and values takes as a multiple of its FLOPs: they are written and read, too.
        mesh: the devices.
    """

    mla: MlaConfig
    backend: AttentionBackend
    write_cost: float
    mesh: Mesh

    @property
    def num_tokens(self) -> int:
        """Tokens that the sequences of a step's prompts may have together."""
        return self.backend.config.num_pages * self.backend.config.page_size

    def costs(self, rows: Iterable[tuple[int, int]]) -> PrefillCosts:
        """What the prompts of a step take in both forms.

        Args:
            rows: (tokens to run, tokens of the sequence once they ran) of the rows that run several tokens.
        """
        mla, config = self.mla, self.backend.config
        absorbed_pair = 2 * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
        mha_pair = 4 * config.head_dim
        # Keys and values of a step's own tokens cost what absorbing its queries and results would.
        per_token = self.write_cost * 2 * mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
        num_pages, absorbed, mha = 0, 0.0, 0.0
        for num_tokens, length in rows:
            num_pages += -(-length // config.page_size)
            pairs = num_tokens * length - num_tokens * (num_tokens - 1) / 2
            absorbed += pairs * absorbed_pair
            mha += pairs * mha_pair + length * per_token
        return PrefillCosts(absorbed, mha if num_pages <= config.num_pages else math.inf)

    def can_pay(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens are ever cheaper in the MHA form: longer sequences favour it."""
        costs = self.costs([(min(num_tokens, self.num_tokens), self.num_tokens)])
        return costs.mha < costs.absorbed

    def keys_and_values(self, matrices: tuple[jax.Array, jax.Array], x_PKSZ: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [P, N, S, E] of each head, from what is cached.

        Args:
            matrices: see `KvBProj.by_head`.
            x_PKSZ: cached channels of each key head, which are all the same.
        """
        mla, size = self.mla, self.backend.config.head_dim
        w_uk_KGHC, w_uv_KGVC = (each.reshape(x_PKSZ.shape[1], -1, *each.shape[1:]) for each in matrices)
        latent_PKSC, k_PKSR = x_PKSZ[..., : mla.kv_lora_rank], x_PKSZ[..., mla.kv_lora_rank :]
        k_PKGSH = jnp.einsum("pksc,kghc->pkgsh", latent_PKSC, w_uk_KGHC)
        k_PKGSR = jnp.broadcast_to(k_PKSR[:, :, None], (*k_PKGSH.shape[:-1], mla.qk_rope_head_dim))
        v_PKGSV = jnp.einsum("pksc,kgvc->pkgsv", latent_PKSC, w_uv_KGVC)
        k_PKGSE = pad_last_axis(jnp.concatenate([k_PKGSH, k_PKGSR], axis=-1), size)
        v_PKGSE = pad_last_axis(v_PKGSV, size)
        by_head = (x_PKSZ.shape[0], -1, *k_PKGSE.shape[-2:])
        return k_PKGSE.reshape(by_head), v_PKGSE.reshape(by_head)

    def plan(self, cached: AttentionBackend, meta: AttentionMeta) -> "MhaPrefillCall":
        """What the layers of a step need.

        Args:
            cached: the backend of the cache.
            meta: the step, whose prompts fit the room.
        """
        prefill, writer = prefill_meta(meta), cached.writer()
        remapped, pages = remap_pages(prefill, self.backend.config.page_size, self.backend.config.num_pages)
        return MhaPrefillCall(
            workspace=self,
            single=PagedAttentionCall(cached, cached.plan(decode_meta(meta))),
            writer=PagedAttentionCall(writer, writer.plan(prefill)),
            prompts=self.backend.plan(remapped),
            pages=pages,
            num_single=meta.distribution_2[0],
            num_rows=meta.kv_lens_B.shape[0],
        )


class MhaPrefillCall(NamedTuple):
    """Attention of a step whose prompts take the MHA form; see `AttentionCall`.

    Attributes:
        workspace: where keys and values of the prompts go.
        single: attention of the rows that run a single token, over the cache.
        writer: writes the prompts' tokens to the cache.
        prompts: the backend's metadata of the prompts, over the workspace.
        pages: pages of a layer whose keys and values are computed.
        num_single: i32, rows that run a single token; they come first.
        num_rows: rows of the step.
        mla: see `LayerContext`.
    """

    workspace: MlaPrefillWorkspace
    single: PagedAttentionCall
    writer: PagedAttentionCall
    prompts: Plan
    pages: RemappedPages
    num_single: jax.Array
    num_rows: int
    mla: Literal["absorbed", "mha"] = "mha"

    def attend(
        self,
        attention: Any,
        q_TNH: jax.Array,
        k_TKH: jax.Array,
        v_TKH: jax.Array,
        cache: Cache,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """See `AttentionCall.attend`."""
        # Any queries will do.
        _, cache = self.writer.attend(attention, k_TKH, k_TKH, v_TKH, cache, layer)
        rows = slice(self.num_rows)
        q_BNZ = attention.kv_b_proj.absorb(q_TNH[rows])
        o_BNC, cache = self.single.attend(attention, q_BNZ, k_TKH[rows], v_TKH[rows], cache, layer)
        o_TNV = self._attend_prompts(attention, q_TNH, k_TKH, cache, layer)
        o_BNV = attention.kv_b_proj.project_v(o_BNC)
        is_single_B = jnp.arange(self.num_rows) < self.num_single
        return o_TNV.at[rows].set(jnp.where(is_single_B[:, None, None], o_BNV, o_TNV[rows])), cache

    def _attend_prompts(
        self, attention: Any, q_TNH: jax.Array, k_TKZ: jax.Array, cache: Cache, layer: jax.Array
    ) -> jax.Array:
        """[T, N, V] over the room."""
        workspace, cached = self.workspace, self.single.backend
        matrices = attention.kv_b_proj.by_head(q_TNH.dtype)
        scales = kv_scales_of(attention.cache_scales, cached.config.value_dim)
        first_page = layer * cached.config.num_pages
        pages = move_pages(
            self._keys_and_values,
            (matrices, None if scales is None else scales.keys_KH),
            (cached, cache),
            workspace.backend,
            self.pages._replace(page_P=self.pages.page_P + first_page),
            workspace.mesh,
        )
        # The backend writes this step's own: they may be more exact than what is cached.
        k_TNE, v_TNE = (x_TN1E[:, :, 0] for x_TN1E in workspace.keys_and_values(matrices, k_TKZ[:, :, None]))
        q_TNE = pad_last_axis(q_TNH, workspace.backend.config.head_dim)
        o_TNE, _ = workspace.backend.attend(q_TNE, k_TNE, v_TNE, pages, jnp.int32(0), self.prompts)
        return o_TNE[..., : workspace.mla.v_head_dim]

    def _keys_and_values(
        self, operands: tuple[tuple[jax.Array, jax.Array], jax.Array | None], x_PKSZ: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values of what is cached; operands are the matrices and the cache's factors."""
        matrices, scale_KZ = operands
        if scale_KZ is not None:
            x_PKSZ = x_PKSZ.astype(jnp.float32) * scale_KZ[:, None]
        return self.workspace.keys_and_values(matrices, x_PKSZ.astype(matrices[0].dtype))
