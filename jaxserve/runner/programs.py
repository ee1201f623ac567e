"""The jitted functions of a step and the shapes they are compiled for; owns no device memory.

A step is two programs: `forward` computes logits, `sample` samples tokens from them. The grammar mask of a row can
depend on its previous token, so masks are sent while the device already runs the forward pass.

All replicas of the model (`--dp-size`) run their steps in one program, split over the mesh axis `data`: their caches,
states and batches are joined along the leading axis, and no replica reads another's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.layers.context import Backends, ExpertOps, LayerOps, LinearOps, NoLora, StepLora
from jaxserve.layers.mla_prefill import MlaPrefillWorkspace
from jaxserve.lora.ops import Adapters, LoraOps
from jaxserve.lora.pool import LoraPoolLayout, lora_pool_specs, lora_pool_splits, slot_spec, write_slot
from jaxserve.models.decoder import Decoder, StepOps
from jaxserve.models.param_spec import ParamSpec, Path, Weights, tree_of
from jaxserve.parallel.mesh import named_sharding, over_replicas, partition_spec, weight_format
from jaxserve.runner.batch import BatchLayout, ForwardBatch, RowTable, SampleBatch, SampleMasks
from jaxserve.runner.buckets import Bucket, ForwardShape, SampleShape
from jaxserve.runner.compiler_options import compiler_options
from jaxserve.runner.fields import SampleField, TokenField
from jaxserve.runner.state import DeviceState, empty_state, row_state, write_row
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, SchedulerOutput
from kernels_pallas.paged_attention.api import Cache
from kernels_pallas.sampling.api import SampleOutput, SamplingInputs, SamplingMode, SamplingState, mask_words
from kernels_pallas.sampling.common.summary import Shard
from kernels_pallas.shards import DATA, MODEL, model_size

T = TypeVar("T")

NOTHING = SchedulerOutput(step=-1, new_rows=(), rows=())


class StepModel(NamedTuple):
    """A model, its backends and its memory layout.

    Attributes:
        decoder: the model.
        backends: the implementation of each op; the attention backend shapes the cache.
        mesh: the devices.
        layout: sizes of rows, pages and vocabulary.
        buckets: shapes to compile, widest first.
        sample_modes: modes with a sampling program of their own, in order.
        lora_pool: slots for LoRA adapters, if requests may name adapters.
        lora_groups: paths of the pool's groups that use the LoRA kernels; the others use portable XLA.
        linears: paths of the linear modules that the kernel supports; see `LinearOps`.
        mla_workspace: workspace for per-head keys and values of MLA prompts, if their MHA form may be used.
    """

    decoder: Decoder
    backends: Backends
    mesh: Mesh
    layout: BatchLayout
    buckets: tuple[Bucket, ...]
    sample_modes: tuple[SamplingMode, ...]
    lora_pool: LoraPoolLayout | None = None
    lora_groups: tuple[Path, ...] = ()
    linears: tuple[Path, ...] = ()
    mla_workspace: MlaPrefillWorkspace | None = None

    def ops(self, *, mha_prefill: bool = False) -> StepOps:
        """Return the ops that layers compute with."""
        backends, mesh = self.backends, self.mesh
        layer = LayerOps(
            LinearOps(backends.linear, mesh, self.linears, backends.linear_activations),
            ExpertOps(backends.experts, mesh, backends.router, backends.expert_activations),
            backends.norm,
            backends.rope,
            backends.head_matmul,
        )
        return StepOps(backends.attention, layer, self.mla_workspace if mha_prefill else None)

    def lora_ops(self) -> LoraOps | None:
        """Return the LoRA ops, or None without a LoRA pool."""
        if (pool := self.lora_pool) is None:
            return None
        splits = lora_pool_splits(self.decoder, pool, self.mesh)
        return LoraOps(self.backends.lora, self.lora_groups, self.backends.lora_experts, pool.num_slots - 1, splits)

    @property
    def shapes(self) -> list[ForwardShape]:
        """Forward passes that a step may need, widest first."""
        shapes = [ForwardShape(bucket) for bucket in self.buckets]
        if self.lora_pool is not None:
            shapes += [ForwardShape(bucket, adapted=True) for bucket in self.buckets]
        if (workspace := self.mla_workspace) is not None:
            mixed = (bucket for bucket in self.buckets if not bucket.single_tokens)
            shapes += [
                ForwardShape(bucket, mha_prefill=True)
                for bucket in mixed
                if workspace.can_be_cheaper(bucket.num_tokens)
            ]
        return shapes

    @property
    def sample_shapes(self) -> list[SampleShape]:
        """Sampling programs that a step may need, widest first."""
        rows = sorted({bucket.num_rows for bucket in self.buckets}, reverse=True)
        return [SampleShape(num_rows, mode) for num_rows in rows for mode in self.sample_modes]


class StepPrograms:
    """Lowers the programs that a runner compiles and calls.

    Attributes:
        num_replicas: number of replicas of the model.
        by_replica: sharding of arrays whose leading axis is split over the replicas.
    """

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self.num_replicas: int = model.mesh.shape[DATA]
        self.by_replica = NamedSharding(model.mesh, P(DATA))
        # Logits stay where they are made: split over the vocabulary, as the output head is.
        vocab_axis = partition_spec(("vocab",), (model.layout.vocab_size,), model.mesh)[0]
        self._shard = Shard(model.layout.vocab_size, vocab_axis if model_size(model.mesh) > 1 else None)
        self._by_id = NamedSharding(model.mesh, P(DATA, self._shard.axis_name))
        sampling: list[Any] = [self._by_id, self.by_replica, self.by_replica, self.by_replica]
        arrays: list[Any] = [self.by_replica, SamplingState(*sampling)]
        self._state_sharding = DeviceState(*arrays)
        # Keys: whether rows have adapters, and whether MLA prompts take the MHA form.
        self._forward = {
            (adapted, mha_prefill): self._jit_forward(adapted=adapted, mha_prefill=mha_prefill)
            for adapted, mha_prefill in ((False, False), (True, False), (False, True))
        }
        self._sample = {mode: self._jit_sample(mode) for mode in model.sample_modes}
        self._write_row = jax.jit(write_row, donate_argnums=0, out_shardings=self._state_sharding)
        lora_pool_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.lora_pool_shapes())
        self._write_slot = jax.jit(write_slot, donate_argnums=0, out_shardings=lora_pool_shardings)

    def _jit_forward(self, *, adapted: bool, mha_prefill: bool) -> Any:
        model = self._model
        weight_specs = model.decoder.weight_tree(lambda spec: over_replicas(spec.axes))
        pool_specs = tree_of((path, over_replicas(spec.axes)) for path, spec in self._lora_pool_specs().items())
        static = _ForwardModel(model.decoder, model.ops(mha_prefill=mha_prefill), model.lora_ops())
        # Manual over `data` only; the compiler partitions over the axes of `MODEL`.
        function = self._per_replica(
            partial(_forward, static),
            {DATA},
            (weight_specs, pool_specs if adapted else {}, P(DATA), P(DATA), P(DATA)),
            P(DATA),
        )
        return jax.jit(
            function,
            donate_argnums=2,
            out_shardings=(self._cache_shardings(), self._by_id),
            compiler_options=compiler_options(model.mesh, counts_on_device=mha_prefill),
        )

    def _jit_sample(self, mode: SamplingMode) -> Any:
        mesh = self._model.mesh
        state = jax.tree.map(lambda sharding: sharding.spec, self._state_sharding)
        function = self._per_replica(
            partial(_sample, self._model.decoder, partial(self._model.backends.sampler, mode=mode), self._shard),
            {DATA, *MODEL},
            (self._by_id.spec, state, P(DATA), P(DATA)),
            (state, P(DATA)),
        )
        # Every host reads the tokens of all replicas, but may hold only some of them.
        out = NamedSharding(mesh, P()) if mesh.is_multi_process else self.by_replica
        return jax.jit(
            function,
            donate_argnums=1,
            out_shardings=(self._state_sharding, out),
            compiler_options=compiler_options(mesh),
        )

    def lower_forward(self, shape: ForwardShape) -> jax.stages.Lowered:
        """Lower `(weights, lora_pool, cache, last_token_R, batch) -> (cache, logits)`; the cache is donated.

        The LoRA pool is empty in steps without adapters.
        """
        batch = RowTable(self._model.layout).build(NOTHING, shape.bucket)
        lora_pool = self.lora_pool_shapes() if shape.adapted else {}
        state = self.state_shapes()
        return self._forward[shape.adapted, shape.mha_prefill].lower(
            self.weight_shapes(), lora_pool, self.cache_shapes(), state.last_token_R, self._replicated(batch)
        )  # fmt: skip

    def lower_sample(self, shape: SampleShape) -> jax.stages.Lowered:
        """Lower `(logits, state, batch, masks) -> (state, out)`; the state is donated."""
        layout, num_rows = self._model.layout, shape.num_rows
        batch = RowTable(layout).sample_batch(NOTHING, np.zeros(0, np.int32), num_rows)
        masks = SampleMasks(np.zeros(num_rows, bool), np.zeros((num_rows, mask_words(layout.vocab_size)), np.int32))
        logits = self.logits_shape(num_rows)
        return self._sample[shape.mode].lower(logits, self.state_shapes(), *self._replicated((batch, masks)))

    def lower_write_row(self) -> jax.stages.Lowered:
        """Lower `(state, row, contents) -> state`; the state is donated."""
        contents = row_state(NewRow(row=0, sampling=SamplingParams(), seed=0), self._model.layout.vocab_size)
        return self._write_row.lower(self.state_shapes(), np.int32(0), contents)

    def lower_write_slot(self) -> jax.stages.Lowered:
        """Lower `(lora_pool, slot, contents) -> lora_pool`; the pool is donated."""
        return self._write_slot.lower(self.lora_pool_shapes(), np.int32(0), self.slot_shapes())

    def lora_pool_shapes(self) -> Weights:
        """Return shapes, dtypes and shardings of the LoRA pool."""
        return tree_of((path, self._shape_of(spec)) for path, spec in self._lora_pool_specs().items())

    def slot_shapes(self) -> Weights:
        """Return shapes, dtypes and shardings of one slot of the LoRA pool."""
        return tree_of((path, self._shape_of(slot_spec(spec))) for path, spec in self._lora_pool_specs().items())

    def _lora_pool_specs(self) -> dict[Path, ParamSpec]:
        """Return the specs of the LoRA pool's arrays; none without a pool."""
        if self._model.lora_pool is None:
            return {}
        return lora_pool_specs(self._model.decoder, self._model.lora_pool)

    def weight_shapes(self) -> Weights:
        """Return shapes, dtypes, shardings and layouts of the weights."""
        mesh = self._model.mesh
        return self._model.decoder.weight_tree(
            lambda spec: jax.ShapeDtypeStruct(
                spec.shape, spec.dtype, sharding=weight_format(spec.axes, spec.shape, mesh)
            )
        )

    def _shape_of(self, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(spec.axes, spec.shape, self._model.mesh)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    def logits_shape(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """Return the shape of the f32 logits of a forward pass with `num_rows` rows per replica."""
        shape = (self.num_replicas * num_rows, self._model.layout.vocab_size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._by_id)

    def cache_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes, dtypes and shardings of the cache's arrays."""
        shardings = self._cache_shardings()
        return {
            name: jax.ShapeDtypeStruct(
                (self.num_replicas * spec.shape[0], *spec.shape[1:]), spec.dtype, sharding=shardings[name]
            )
            for name, spec in self._model.backends.attention.cache_spec().items()
        }

    def state_shapes(self) -> DeviceState:
        """Return shapes, dtypes and shardings of the state."""
        return jax.tree.map(
            lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
            jax.eval_shape(self.empty_state),
            self._state_sharding,
        )

    def empty_state(self) -> DeviceState:
        """Return the neutral state of all rows."""
        layout = self._model.layout
        return empty_state(self.num_replicas * (layout.max_rows + 1), layout.vocab_size, self._state_sharding)

    def _cache_shardings(self) -> dict[str, NamedSharding]:
        specs = self._model.backends.attention.cache_spec()
        return {name: NamedSharding(self._model.mesh, P(DATA, *spec.partition[1:])) for name, spec in specs.items()}

    def _replicated(self, arrays: T) -> T:
        """Return the shapes of all replicas' stacked arrays, given the arrays of one replica."""
        return jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(
                (self.num_replicas, *array.shape), array.dtype, sharding=self.by_replica
            ),
            arrays,
        )

    def _per_replica(self, function: Callable[..., Any], axes: set[str], in_specs: Any, out_specs: Any) -> Any:
        """Wrap a function in a `shard_map` that is manual over `axes` of the mesh."""
        return jax.shard_map(
            function,
            mesh=self._model.mesh,
            axis_names=axes,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )


class _ForwardModel(NamedTuple):
    """The static arguments of a forward pass."""

    decoder: Decoder
    ops: StepOps
    lora_ops: LoraOps | None


def _forward(
    model: _ForwardModel,
    weights: Weights,
    pool: Weights,
    cache: Cache,
    last_token_R: jax.Array,
    batch: ForwardBatch,
) -> tuple[Cache, jax.Array]:
    """Run the forward pass of one replica: embedding, layers, and logits of the sampled tokens only."""
    batch = jax.tree.map(lambda array: array[0], batch)
    tokens_4T, sample_8B = batch.tokens_4T, batch.sample.ints_8B
    token_ids_T = tokens_4T[TokenField.ID]
    pending_T = token_ids_T < 0
    last_T = last_token_R[jnp.where(pending_T, -1 - token_ids_T, 0)]
    token_ids_T = jnp.where(pending_T, last_T, token_ids_T)

    def lora(slot: jax.Array) -> StepLora:
        # The pool is empty in steps without adapters.
        return Adapters(pool, slot, model.lora_ops) if model.lora_ops is not None and pool else NoLora()

    x_TD, cache = model.decoder.forward(
        weights,
        cache,
        token_ids_T,
        tokens_4T[TokenField.POSITION],
        batch.attention_meta(),
        model.ops,
        lora(tokens_4T[TokenField.LORA_SLOT]),
    )
    x_BD = x_TD[sample_8B[SampleField.TOKEN_INDEX]]
    return cache, model.decoder.logits(weights, x_BD, lora(sample_8B[SampleField.LORA_SLOT]))


def _sample(
    decoder: Decoder,
    sampler: Callable[..., SampleOutput],
    shard: Shard,
    logits_BV: jax.Array,
    state: DeviceState,
    batch: SampleBatch,
    masks: SampleMasks,
) -> tuple[DeviceState, SampleOutput]:
    """Sample the tokens of one replica on one shard of the vocabulary, and return the updated state with them."""
    batch, masks = jax.tree.map(lambda array: array[0], (batch, masks))
    out: SampleOutput = decoder.tokenwise(
        lambda logits, *fields: sampler(logits, SamplingInputs(*fields), state.sampling, shard),
        logits_BV,
        *batch.sampling_inputs(masks),
    )
    return state.record(batch.ints_8B[SampleField.WRITE_ROW], out, shard), out
