"""LoRA updates against numpy in float64; the Pallas kernels run in interpret mode, with race detection."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import LoraConfig
from kernels_pallas.dispatch import Choice
from kernels_pallas.lora_matmul.api import LoraMatmul
from kernels_pallas.lora_matmul.cases import SLOTS, LoraCase, Slots, lora_case
from kernels_pallas.lora_matmul.common.slot_blocks import slot_lists, slot_pairs
from kernels_pallas.lora_matmul.xla.backend import XlaLora
from tests.parity.test_lora_merge import EVERYTHING, SMALL
from tests.support.kernels import KERNELS, interpreted, needs_pallas
from tests.support.marks import slow
from tests.support.tiny import write_adapter, write_checkpoint

SIZES = ("num_tokens", "num_inputs", "num_outputs", "rank", "num_slots")


def implementation(name: str, tp_size: int = 1, *, detect_races: bool = True) -> LoraMatmul:
    return XlaLora() if name == "xla" else interpreted(name, tp_size, detect_races=detect_races, num_cores=5).lora()


def check(lora: LoraMatmul, sizes: tuple[int, ...], slots: Slots, **options: Any) -> None:
    splits = {name: options.pop(name) for name in ("split_inputs", "split_outputs") if name in options}
    case = LoraCase(**dict(zip(SIZES, sizes, strict=True)), slots=slots, **options)
    step = lora_case(lora, case, **splits)
    step.verify(jax.jit(step.run)(*step.arguments))


@pytest.mark.parametrize("slots", SLOTS.values())
@pytest.mark.parametrize("sizes", [slow((8, 64, 64, 16, 3)), (130, 320, 192, 48, 7), slow((300, 128, 384, 16, 2))])
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_each_token_gets_its_own_adapter(name: str, sizes: tuple[int, ...], slots: Any) -> None:
    check(implementation(name), sizes, slots)


@pytest.mark.parametrize("name", ["xla", *KERNELS])
@pytest.mark.parametrize("rank", [16, 48])
def test_modules_with_the_same_inputs_share_the_first_product(name: str, rank: int) -> None:
    """The joint ranks are 48 and 144; the GPU's registers cannot hold 144 in one pass."""
    check(implementation(name), (40, 128, 192, rank, 3), SLOTS["mixed"], members=3)


@needs_pallas
@pytest.mark.parametrize("sizes", [(1, 100, 70, 2, 1), (24, 4224, 2500, 8, 3)])
def test_tpus_take_any_size_and_float32(sizes: tuple[int, ...]) -> None:
    """The inputs are no multiple of 128, and the outputs make several blocks, the last of which is partial."""
    check(implementation("tpu"), sizes, SLOTS["mixed"], dtype=jnp.float32)


@needs_pallas
@pytest.mark.parametrize("split", [{"split_inputs": True}, {"split_outputs": True}, {}])
def test_shards_give_what_one_device_gives(split: dict[str, bool]) -> None:
    """Only the TPU kernel is tested, since the GPU interpreter supports a single device."""
    check(implementation("tpu", tp_size=2), (70, 256, 256, 16, 3), SLOTS["mixed"], members=2, **split)


@needs_pallas
def test_a_row_that_is_not_finite_harms_no_other() -> None:
    def slots(_: int, __: int) -> np.ndarray:
        return np.array([1, 2, 1, 2, 0, 1, 2, 1, 2])

    sizes = dict(zip(SIZES, (9, 128, 128, 16, 2), strict=True))
    for name in ("tpu", "gpu"):
        step = lora_case(implementation(name), LoraCase(**sizes, slots=slots, nan_token=3))
        (got,) = jax.jit(step.run)(*step.arguments)
        assert np.isnan(np.asarray(got, np.float64)).any(axis=1).tolist() == [row == 3 for row in range(9)]


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
