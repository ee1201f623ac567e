"""MLA prefill in the MHA form: attention over the keys and values of each head (arXiv:2405.04434, section 2.1.2).

In the absorbed form, every head attends over keys of 576 channels and values of 512; in the MHA form, over keys of
128 + 64 channels and values of 128. The MHA form is cheaper for long prompts, although every layer has to compute keys
and values from the latent vectors first. If the sequences of a step's prompts fit the workspace, each layer writes
their keys and values there, in the pages of an attention backend for ordinary heads. Rows that run a single token stay
in the absorbed form.

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
from kernels_pallas.grouped_matmul.xla.heads import multiply_heads
from kernels_pallas.paged_attention.api import AttentionBackend, AttentionMeta, Cache, Plan, pad_last_axis
from kernels_pallas.paged_attention.common.page_moves import move_pages
from kernels_pallas.paged_attention.common.split_meta import RemappedPages, decode_meta, prefill_meta, remap_pages


class PrefillCosts(NamedTuple):
    """FLOPs of the prompts of a step, per layer and head.

    Attributes:
        absorbed: FLOPs of the absorbed form.
        mha: FLOPs of the MHA form; infinite if the workspace is too small.
    """

    absorbed: float
    mha: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaPrefillWorkspace:
    """Workspace for the per-head keys and values of prompts, one layer at a time.

    Attributes:
        mla: sizes of the model's attention.
        backend: attention backend over the workspace, whose pages are those of a single layer.
        write_cost: cost of computing keys and values, including memory traffic, as a multiple of its FLOPs.
        mesh: the device mesh.
    """

    mla: MlaConfig
    backend: AttentionBackend
    write_cost: float
    mesh: Mesh

    @property
    def num_tokens(self) -> int:
        """Maximum total length of the sequences of a step's prompts, in tokens."""
        return self.backend.config.num_pages * self.backend.config.page_size

    def costs(self, rows: Iterable[tuple[int, int]]) -> PrefillCosts:
        """Return the cost of the prompts of a step in both forms.

        Args:
            rows: (tokens to run, sequence length after they ran) of each row that runs several tokens.
        """
        mla, config = self.mla, self.backend.config
        absorbed_pair = 2 * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
        mha_pair = 4 * config.head_dim
        # Projecting the step's own tokens costs as much as absorbing its queries and results, so neither is counted.
        per_token = self.write_cost * 2 * mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
        num_pages, absorbed, mha = 0, 0.0, 0.0
        for num_tokens, length in rows:
            num_pages += -(-length // config.page_size)
            pairs = num_tokens * length - num_tokens * (num_tokens - 1) / 2
            absorbed += pairs * absorbed_pair
            mha += pairs * mha_pair + length * per_token
        return PrefillCosts(absorbed, mha if num_pages <= config.num_pages else math.inf)

    def can_be_cheaper(self, num_tokens: int) -> bool:
        """Return whether a step of `num_tokens` tokens can be cheaper in the MHA form; longer sequences favour it."""
        costs = self.costs([(min(num_tokens, self.num_tokens), self.num_tokens)])
        return costs.mha < costs.absorbed

    def keys_and_values(self, matrices: tuple[jax.Array, jax.Array], x_PKSZ: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute keys and values of each head, [P, N, S, E], from latent and rotated channels.

        Args:
            matrices: see `KvBProj.by_head`.
            x_PKSZ: channels of each KV head, as cached; all KV heads have the same.
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
        """Build the attention call that the layers of a step share.

        Args:
            cached: attention backend of the KV cache.
            meta: metadata of the step, whose prompts must fit the workspace.
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
    """Attention of a step whose prompts use the MHA form; see `AttentionCall`.

    Attributes:
        workspace: workspace for keys and values of the prompts.
        single: attention over the cache, for the rows that run a single token.
        writer: writes the prompts' tokens to the cache.
        prompts: the workspace backend's plan for the prompts.
        pages: pages of a layer in the cache, from which keys and values are computed.
        num_single: i32, number of rows that run a single token; they come first.
        num_rows: number of rows of the step.
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
        # The queries do not matter: the result is discarded.
        _, cache = self.writer.attend(attention, k_TKH, k_TKH, v_TKH, cache, layer)
        rows = slice(self.num_rows)
        q_BNQ = q_TNH[rows]
        q_BNZ = attention.kv_b_proj.absorb(q_BNQ, q_BNQ[..., attention.kv_b_proj.key_dim :], multiply_heads)
        o_BNC, cache = self.single.attend(attention, q_BNZ, k_TKH[rows], v_TKH[rows], cache, layer)
        o_TNV = self._attend_prompts(attention, q_TNH, k_TKH, cache, layer)
        o_BNV = attention.kv_b_proj.project_v(o_BNC, multiply_heads)
        is_single_B = jnp.arange(self.num_rows) < self.num_single
        return o_TNV.at[rows].set(jnp.where(is_single_B[:, None, None], o_BNV, o_TNV[rows])), cache

    def _attend_prompts(
        self, attention: Any, q_TNH: jax.Array, k_TKZ: jax.Array, cache: Cache, layer: jax.Array
    ) -> jax.Array:
        """Return the prompts' attention over the workspace, [T, N, V]."""
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
        # The backend writes the step's own keys and values: they may be more precise than cached ones.
        k_TNE, v_TNE = (x_TN1E[:, :, 0] for x_TN1E in workspace.keys_and_values(matrices, k_TKZ[:, :, None]))
        q_TNE = pad_last_axis(q_TNH, workspace.backend.config.head_dim)
        o_TNE, _ = workspace.backend.attend(q_TNE, k_TNE, v_TNE, pages, jnp.int32(0), self.prompts)
        return o_TNE[..., : workspace.mla.v_head_dim]

    def _keys_and_values(
        self, operands: tuple[tuple[jax.Array, jax.Array], jax.Array | None], x_PKSZ: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Compute keys and values of cached pages; `operands` are the matrices and the KV scales."""
        matrices, scale_KZ = operands
        if scale_KZ is not None:
            x_PKSZ = x_PKSZ.astype(jnp.float32) * scale_KZ[:, None]
        return self.workspace.keys_and_values(matrices, x_PKSZ.astype(matrices[0].dtype))
