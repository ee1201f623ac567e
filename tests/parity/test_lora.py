"""Rows with different adapters run in one batch, and each gets the tokens of a model with its adapter merged.

Adapters that PEFT wrote are compared with the tokens that PEFT generates.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.adapters import of_all_experts, read_peft
from jaxserve import LLM, SamplingParams
from jaxserve.config import LoraConfig
from jaxserve.errors import LaunchError, NotFoundError
from jaxserve.layers.args import DecoderArgs
from jaxserve.lora.delta import adaptable
from jaxserve.lora.reader import AdapterReader
from jaxserve.models.registry import find_architecture
from tests.parity.test_lora_merge import EVERYTHING, SMALL
from tests.support.marks import slow
from tests.support.tiny import CONFIG, write_adapter, write_checkpoint, write_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
# Two rows keep the number of programs small; there are more prompts than rows.
SIZES = SMALL | {"max_running_requests": 2, "max_total_tokens": 2048, "chunked_prefill_size": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [[1, 2, 3], [7] * 40, [5]]


def generated(llm: LLM, adapter: str = "") -> list[tuple[int, ...]]:
    return [output.choices[0].token_ids for output in llm.generate(PROMPTS, GREEDY, adapter=adapter)]


def served(base: Path, paths: dict[str, Path], *, slots: int = 3, **options: Any) -> LLM:
    lora = LoraConfig(paths={name: str(path) for name, path in paths.items()}, max_loras_per_batch=slots)
    return LLM(str(base), lora=lora, **(SIZES | options))


def merged(base: Path, adapter: Path) -> list[tuple[int, ...]]:
    with LLM(str(base), merge_lora=str(adapter), **SIZES) as llm:
        return generated(llm)


# The other families are tested below, with adapters that PEFT wrote.
@pytest.mark.parametrize("family", [slow("LlamaForCausalLM"), "Qwen2ForCausalLM"])
def test_rows_get_what_their_merged_models_give(family: str, tmp_path: Path) -> None:
    """There are more adapters than slots, of different ranks and modules; the base model is the same afterwards."""
    base = write_checkpoint(tmp_path / "base", architectures=[family])
    adapters = {
        "all": write_adapter(tmp_path / "all", modules=EVERYTHING, rank=4, seed=1),
        "narrow": write_adapter(tmp_path / "narrow", modules=["q_proj", "down_proj"], rank=2, seed=2, use_rslora=True),
        "head": write_adapter(tmp_path / "head", modules=["lm_head"], rank=8, seed=3),
    }
    want = {name: merged(base, path) for name, path in adapters.items()}
    with LLM(str(base), **SIZES) as llm:
        want[""] = generated(llm)
    assert len({str(tokens) for tokens in want.values()}) == 4
    with served(base, adapters) as llm:
        for name in ("all", "", "narrow", "head", "all", ""):
            assert generated(llm, name) == want[name], name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", vocab_size=264)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    config = CONFIG | {"vocab_size": 264}
    return {
        f"a{seed}": write_adapter(folder / f"a{seed}", config, modules=EVERYTHING, rank=2 + seed, seed=seed)
        for seed in range(8)
    }


@pytest.fixture(scope="module")
def alone(base: Path, adapters: dict[str, Path]) -> dict[str, list[tuple[int, ...]]]:
    """Tokens of the base model and of each adapter, generated one after the other."""
    with served(base, adapters, slots=2) as llm:
        return {name: generated(llm, name) for name in ("", *adapters)}


@pytest.mark.parametrize(
    "options",
    [
        slow({}),
        slow({"tp_size": 8}),
        {"dp_size": 2, "tp_size": 2},
        slow({"deterministic": True}),
        {"enough_pages_for_two": True},
    ],
    ids=str,
)
def test_mixed_adapter_batch_matches_single_adapter_runs(
    base: Path, adapters: dict[str, Path], alone: dict[str, list[tuple[int, ...]]], options: dict[str, Any]
) -> None:
    """Eight adapters and the base run in one batch: on several devices, in tiles of tokens, and with preempted rows."""
    if options.pop("enough_pages_for_two", False):
        options = {"max_total_tokens": 144, "context_length": 64}
    with served(base, adapters, slots=9, **(SIZES | {"max_running_requests": 9} | options)) as llm:
        names = ["", *adapters]
        with ThreadPoolExecutor(len(names)) as pool:
            got = dict(zip(names, pool.map(lambda name: generated(llm, name), names), strict=True))
        assert llm.stats.num_compiles_after_ready == 0
        assert ("context_length" in options) == (llm.stats.num_preemptions > 0)
    assert got == alone
    assert len({str(tokens) for tokens in alone.values()}) == len(alone)


def test_adapters_of_a_quantised_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """The base's linear weights are 8-bit integers times a power of two per row, so quantising loses nothing."""
    exact = shutil.copytree(base, tmp_path / "exact")
    tensors = load_file(exact / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj" in name:
            elements = np.clip(np.round(weight * 256), -126, 126)
            elements[:, 0] = 127
            tensors[name] = (elements / 256).astype(np.float32)
    save_file(tensors, exact / "model.safetensors")
    want = merged(exact, adapters["a6"])
    with served(exact, {"a6": adapters["a6"]}, quantization="int8") as llm:
        assert generated(llm, "a6") == want != generated(llm)


def test_choices_grammars_and_logprobs_work_with_adapters(base: Path, adapters: dict[str, Path]) -> None:
    sampling = SamplingParams(seed=3, max_tokens=8, num_logprobs=2, ignore_eos=True)
    with served(base, adapters) as llm:
        [output] = llm.generate([[1, 2]], sampling, num_choices=3, adapter="a3")
        assert len({choice.token_ids for choice in output.choices}) == 3
    with LLM(str(base), merge_lora=str(adapters["a3"]), **SIZES) as llm:
        [want] = llm.generate([[1, 2]], sampling, num_choices=3)
    for got_choice, want_choice in zip(output.choices, want.choices, strict=True):
        assert got_choice.token_ids == want_choice.token_ids
        np.testing.assert_allclose(got_choice.logprobs, want_choice.logprobs, atol=1e-4)


# Norms around both halves of a layer, latent attention, fused modules, and three kinds of experts.
FAMILIES = ("deepseek_v3", "phi3", "gpt_oss", "qwen2_moe")
WITH_ADAPTERS = sorted(folder.parent.name for folder in GOLDEN.glob("*/adapters"))


@pytest.mark.parametrize("name", [name if name in FAMILIES else slow(name) for name in WITH_ADAPTERS])
def test_peft_adapters_match_peft_transcripts(name: str, tmp_path: Path) -> None:
    """Adapters give PEFT's tokens, both next to the base and merged into it.

    They cover patterns of ranks and alphas, fused and all linear modules, the embedding and the head; in models with
    experts also the experts, as parameters of their module, routers, gates of shared experts and latent expansions.
    """
    folders = {folder.name: str(folder) for folder in (GOLDEN / name / "adapters").iterdir()}
    base = shutil.copytree(GOLDEN / name, tmp_path / "base")
    write_tokenizer(base)
    with LLM(str(base), lora=LoraConfig(paths=folders), **SIZES) as llm:
        for adapter, folder in folders.items():
            check_transcripts(llm, Path(folder), adapter)
    if name in ("deepseek_v3", "gpt_oss", "phi3"):  # one of each kind
        with LLM(str(base), merge_lora=folders[max(folders)], **SIZES) as llm:
            check_transcripts(llm, Path(folders[max(folders)]))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("qwen3_moe", {"tp_size": 4, "ep_size": 2}),
        ("qwen3_moe", {"deterministic": True}),
        slow("qwen3_moe", {"dp_size": 2, "dp_attention": True}),
        ("deepseek_v3", {"tp_size": 2, "dp_size": 2}),
    ],
    ids=str,
)
def test_adapted_experts_over_devices_and_in_tiles(name: str, mesh: dict[str, Any], tmp_path: Path) -> None:
    """Experts are distributed or split, heads are split, and replicas are used; adapters run mixed and alone."""
    base = shutil.copytree(GOLDEN / name, tmp_path / "base")
    write_tokenizer(base)
    [folder] = (GOLDEN / name / "adapters").iterdir()
    other = shutil.copytree(folder, tmp_path / "other")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": -3.0}))
    lora = LoraConfig(paths={"a": str(folder), "b": str(other)})
    with LLM(str(base), lora=lora, **SIZES, **mesh) as llm:
        check_transcripts(llm, folder, "a")
        alone = {name: generated(llm, name) for name in ("", "a", "b")}
        assert len({str(tokens) for tokens in alone.values()}) == 3
        with ThreadPoolExecutor(3) as pool:
            assert dict(zip(alone, pool.map(lambda name: generated(llm, name), alone), strict=True)) == alone


def test_experts_one_by_one_are_those_of_their_parameters(tmp_path: Path) -> None:
    """Adapters made with transformers 4 have a module per expert; PEFT fuses gate and up, each with its own ranks."""
    [folder] = (GOLDEN / "qwen3_moe" / "adapters").iterdir()
    config = json.loads((GOLDEN / "qwen3_moe" / "config.json").read_text())
    architecture = find_architecture(config)
    model = architecture.model_config(config)
    decoder = architecture.build(DecoderArgs(model, jnp.dtype(jnp.float32)))
    reader = AdapterReader(decoder, architecture.tensor_names(model))
    fused: dict[str, np.ndarray] = {}
    single: dict[str, np.ndarray] = {}
    for module, (a_RI, b_OR, _) in read_peft(folder).modules.items():
        parent, _, parameter = module.rpartition(".")
        if not of_all_experts(module):
            both = peft_tensors(module, a_RI, b_OR)
            fused, single = fused | both, single | both
            continue
        # The projections that make up the parameter, with their outputs and their ranks.
        (_, num_outputs, rank), projections = b_OR.shape, {"down_proj": (slice(None), slice(None))}
        if parameter == "gate_up_proj":
            projections = {
                name: (slice(half * num_outputs // 2, (half + 1) * num_outputs // 2), slice(2 * half, 2 * half + 2))
                for half, name in enumerate(("gate_proj", "up_proj"))
            }
        b_EOR = np.zeros_like(b_OR)
        for name, (outputs, ranks) in projections.items():
            b_EOR[:, outputs, ranks] = b_OR[:, outputs, ranks]
            for expert in range(len(a_RI)):
                single |= peft_tensors(f"{parent}.{expert}.{name}", a_RI[expert, ranks], b_OR[expert, outputs, ranks])
        wrapper = f"{parent}.base_layer" if parameter == "gate_up_proj" else parent
        flat_a, flat_b = a_RI.reshape(-1, a_RI.shape[-1]), b_EOR.transpose(1, 2, 0).reshape(num_outputs, -1)
        fused |= peft_tensors(wrapper, flat_a, flat_b)
        assert rank == 2 * len(projections)
    settings = json.loads((folder / "adapter_config.json").read_text())
    one_by_one = {"target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    for name, tensors, changes in (("fused", fused, {}), ("single", single, one_by_one)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings | changes))
    got, want = (reader.read(tmp_path / name) for name in ("fused", "single"))
    assert got.rank == want.rank == 2
    assert got.weights.keys() == want.weights.keys()
    for path, lora in want.weights.items():
        for left, right in zip(got.weights[path], lora, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=str(path))


def peft_tensors(module: str, a_RI: np.ndarray, b_OR: np.ndarray) -> dict[str, np.ndarray]:
    """Return both matrices under PEFT's names."""
    matrices = {"A": a_RI, "B": b_OR}
    return {
        f"base_model.model.{module}.lora_{name}.weight": np.ascontiguousarray(matrix)
        for name, matrix in matrices.items()
    }


def check_transcripts(llm: LLM, folder: Path, adapter: str = "") -> None:
    golden = np.load(folder / "golden.npz")
    sampling = SamplingParams(temperature=0, max_tokens=golden["transcripts"].shape[1], ignore_eos=True)
    outputs = llm.generate(golden["prompts"].tolist(), sampling, adapter=adapter)
    assert [list(output.choices[0].token_ids) for output in outputs] == golden["transcripts"].tolist()


def test_an_unknown_adapter_is_refused_with_the_loaded_ones(base: Path, adapters: dict[str, Path]) -> None:
    with (
        served(base, {"a1": adapters["a1"]}) as llm,
        pytest.raises(NotFoundError, match="'b' does not exist; loaded: a1"),
    ):
        llm.generate("x", adapter="b")


def test_adapters_come_and_go(base: Path, adapters: dict[str, Path], alone: dict[str, list[tuple[int, ...]]]) -> None:
    """Two adapters use one name in turn, on two devices; the prefix cache of the first does not serve the second."""
    lora = LoraConfig(max_rank=9, target_modules=("all",))
    with LLM(str(base), lora=lora, tp_size=2, **SIZES) as llm:
        for key in ("a1", "a7"):
            llm.load_adapter("a", adapters[key])
            assert generated(llm, "a") == alone[key]
            llm.unload_adapter("a")
        assert generated(llm) == alone[""]
        with pytest.raises(NotFoundError, match="'a' does not exist; loaded: none"):
            llm.unload_adapter("a")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("q_proj", "down_proj"), "it changes .*embed_tokens.*, which are not among --lora-target-modules"),
        (("qkv_proj", "sail"), "--lora-target-modules sail: the model has down_proj, embed_tokens"),
    ],
)
def test_modules_that_were_not_asked_for(
    base: Path, adapters: dict[str, Path], modules: tuple[str, ...], message: str
) -> None:
    lora = LoraConfig(paths={"a1": str(adapters["a1"])}, target_modules=modules)
    with pytest.raises(LaunchError, match=message):
        LLM(str(base), lora=lora, **SIZES)


def test_names_of_modules(base: Path) -> None:
    architecture = find_architecture(CONFIG)
    config = architecture.model_config(CONFIG)
    decoder = architecture.build(DecoderArgs(config, jnp.dtype(jnp.float32)))
    reader = AdapterReader(decoder, architecture.tensor_names(config))
    linear = {path for path in adaptable(decoder) if path[0] == "layers"}
    assert reader.target_paths(["all-linear"]) == linear
    assert reader.target_paths(["all"]) == linear | {("embed", "weight"), ("lm_head", "weight")}
    fused = reader.target_paths(["qkv_proj", "gate_up_proj"])
    assert {path[-2] for path in fused} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_an_adapter_that_is_too_wide_is_refused_at_the_start(base: Path, adapters: dict[str, Path]) -> None:
    lora = LoraConfig(paths={"a7": str(adapters["a7"])}, max_rank=8)
    with pytest.raises(LaunchError, match="--lora-paths a7: rank 9 is more than --max-lora-rank 8"):
        LLM(str(base), lora=lora, **SIZES)
