"""LoRA updates against numpy in float64; the Pallas kernels run in interpret mode, with race detection."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import LoraConfig
from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.dispatch import Choice
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.lora_matmul.common.slot_blocks import slot_lists, slot_pairs
from kernels_pallas.lora_matmul.reference import lora_matmul
from kernels_pallas.lora_matmul.xla.backend import XlaLora
from kernels_pallas.stacked import Stacked
from tests.parity.test_lora_merge import EVERYTHING, SMALL
from tests.support.marks import slow
from tests.support.tiny import write_adapter, write_checkpoint

needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
KERNELS = [pytest.param("tpu", marks=needs_pallas), pytest.param("gpu", marks=needs_pallas)]


def implementation(name: str, tp_size: int = 1, *, detect_races: bool = True) -> LoraMatmul:
    mesh = make_mesh(tp_size)
    if name == "xla":
        return XlaLora()
    if name == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        from kernels_pallas.lora_matmul.tpu import backend as tpu

        params: Any = pltpu.InterpretParams(
            detect_races=detect_races, out_of_bounds_reads="raise", uninitialized_memory="nan"
        )
        return tpu.make_lora_matmul(mesh, params)
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from kernels_pallas.lora_matmul.gpu import backend as gpu

    return gpu.make_lora_matmul(mesh, num_cores=5, interpret=plgpu.InterpretGPUParams(detect_races=detect_races))


class Case:
    """Random LoRA A and B matrices and activations.

    Args:
        sizes: numbers of tokens, inputs, outputs, ranks and slots.
        slots: a function from the numbers of slots and tokens to the slot of each token.
        dtype: dtype of all arrays but the reference's.
        members: number of modules that read the same activations.
    """

    def __init__(
        self, sizes: tuple[int, ...], slots: Callable[[int, int], np.ndarray], dtype: Any, *, members: int = 1
    ) -> None:
        tokens, inputs, outputs, rank, num_slots = sizes
        rng = np.random.default_rng(tokens)
        self.x = jnp.asarray(rng.standard_normal((tokens, inputs)), dtype)
        self.a = jnp.asarray(rng.standard_normal((num_slots, members * rank, inputs)) / inputs**0.5, dtype)
        self.b = jnp.asarray(rng.standard_normal((members, num_slots, rank, outputs)) / rank**0.5, dtype)
        self.slots = jnp.asarray(slots(num_slots, tokens), jnp.int32)

    def updates(self, lora: LoraMatmul, *, split_inputs: bool = False, split_outputs: bool = False) -> list[np.ndarray]:
        """Return the update of each module."""

        @jax.jit
        def run(x: jax.Array, a: jax.Array, b: jax.Array, slots: jax.Array, layer: jax.Array) -> list[jax.Array]:
            plan = lora.plan(slots, a.shape[1])
            h = lora.shrink(x, Stacked(a, layer), plan, split=split_inputs)
            matrices = [Stacked(each, layer) for each in b]
            return [lora.expand(h, each, plan, member=i, split=split_outputs) for i, each in enumerate(matrices)]

        # The second of three layers; the first and the last must not be read.
        a, b = (
            jnp.stack([jnp.full_like(array, jnp.nan), array, jnp.full_like(array, jnp.nan)], axis=axis)
            for array, axis in ((self.a, 0), (self.b, 1))
        )
        updates = run(self.x, a, b, self.slots, jnp.int32(1))
        assert all(update.dtype == self.x.dtype for update in updates)
        return [np.asarray(update, np.float64) for update in updates]

    def check(self, lora: LoraMatmul, *, split_inputs: bool = False, split_outputs: bool = False) -> None:
        slots, rank = np.asarray(self.slots), self.b.shape[-2]
        updates = self.updates(lora, split_inputs=split_inputs, split_outputs=split_outputs)
        for member, (got, b) in enumerate(zip(updates, self.b, strict=True)):
            a = self.a[:, member * rank : (member + 1) * rank]
            want = lora_matmul(*(np.asarray(array, np.float64) for array in (self.x, a, b)), slots)
            np.testing.assert_allclose(got, want, atol=1e-5 if self.x.dtype == jnp.float32 else 0.06)
            assert not np.any(got[slots == 0])


def mixed(num_slots: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, num_slots + 1, tokens)


def of_prompts(num_slots: int, tokens: int) -> np.ndarray:
    """Return slots in a few long runs, as of prompts; the last tokens have no adapter."""
    return np.sort(mixed(num_slots, tokens))[::-1]


def none(num_slots: int, tokens: int) -> np.ndarray:
    return np.zeros(tokens, int)


def last_only(num_slots: int, tokens: int) -> np.ndarray:
    return np.where(np.arange(tokens) == tokens - 1, num_slots, 0)


@pytest.mark.parametrize("slots", [mixed, of_prompts, none, last_only])
@pytest.mark.parametrize("sizes", [slow((8, 64, 64, 16, 3)), (130, 320, 192, 48, 7), slow((300, 128, 384, 16, 2))])
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_each_token_gets_its_own_adapter(name: str, sizes: tuple[int, ...], slots: Any) -> None:
    Case(sizes, slots, jnp.bfloat16).check(implementation(name))


@pytest.mark.parametrize("name", ["xla", *KERNELS])
@pytest.mark.parametrize("rank", [16, 48])
def test_modules_with_the_same_inputs_share_the_first_product(name: str, rank: int) -> None:
    """The joint ranks are 48 and 144; the GPU's registers cannot hold 144 in one pass."""
    Case((40, 128, 192, rank, 3), mixed, jnp.bfloat16, members=3).check(implementation(name))


@needs_pallas
@pytest.mark.parametrize("sizes", [(1, 100, 70, 2, 1), (24, 4224, 2500, 8, 3)])
def test_tpus_take_any_size_and_float32(sizes: tuple[int, ...]) -> None:
    """The inputs are no multiple of 128, and the outputs make several blocks, the last of which is partial."""
    Case(sizes, mixed, jnp.float32).check(implementation("tpu"))


@needs_pallas
@pytest.mark.parametrize("split", [{"split_inputs": True}, {"split_outputs": True}, {}])
def test_shards_give_what_one_device_gives(split: dict[str, bool]) -> None:
    """Only the TPU kernel is tested, since the GPU interpreter supports a single device."""
    Case((70, 256, 256, 16, 3), mixed, jnp.bfloat16, members=2).check(implementation("tpu", tp_size=2), **split)


@needs_pallas
def test_a_row_that_is_not_finite_harms_no_other() -> None:
    for name in ("tpu", "gpu"):
        case = Case((9, 128, 128, 16, 2), lambda *_: np.array([1, 2, 1, 2, 0, 1, 2, 1, 2]), jnp.bfloat16)
        case.x = case.x.at[3].set(jnp.nan)
        (got,) = case.updates(implementation(name))
        assert np.isnan(got).any(axis=1).tolist() == [row == 3 for row in range(9)]


def test_blocks_list_the_slots_of_their_tokens() -> None:
    slot_T = jnp.array([0, 3, 3, 1, 0, 0, 0, 0, 2, 0])
    pairs, lists = slot_pairs(slot_T, 3, 4), slot_lists(slot_T, 3, 4)
    count = int(pairs.num_live_1[0])
    assert list(zip(pairs.block_U[:count].tolist(), pairs.slot_U[:count].tolist(), strict=True)) == [
        (0, 0), (0, 2), (2, 1),
    ]  # fmt: skip
    assert [row[:num] for row, num in zip(lists.slot_CS.tolist(), lists.num_C.tolist(), strict=True)] == [
        [0, 2],
        [],
        [1],
    ]
    assert int(slot_pairs(jnp.zeros(4, jnp.int32), 3, 4).num_live_1[0]) == 1


@needs_pallas
@pytest.mark.slow
def test_a_model_with_the_kernels_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules have adapters, and each of two replicas is split over two devices."""
    base = write_checkpoint(tmp_path / "base")
    paths = {f"a{seed}": str(write_adapter(tmp_path / f"a{seed}", modules=EVERYTHING, seed=seed)) for seed in (1, 2)}
    lora = LoraConfig(paths=paths, max_loras_per_batch=3)
    sizes = SMALL | {"max_running_requests": 2, "chunked_prefill_size": 8, "tp_size": 2, "dp_size": 2}
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

    def generated() -> list[Any]:
        with LLM(str(base), lora=lora, **sizes) as llm:
            outputs = [llm.generate([[1, 2, 3]], sampling, adapter=name) for name in ("", "a1", "a2")]
        return [[output.choices[0].token_ids for output in several] for several in outputs]

    want = generated()
    kernel = implementation("tpu", tp_size=2, detect_races=False)  # race detection takes a minute
    monkeypatch.setattr("jaxserve.layout.backends.choose_lora", lambda *_: Choice(kernel, "tpu", "interpreted"))
    assert generated() == want
