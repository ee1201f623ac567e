"""Weights with a merged adapter are those that numpy computes in float64 from the base and the A and B matrices."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.adapters import read_peft
from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.convert import convert, convert_adapter
from jaxserve.engine.builder import build_runner
from jaxserve.errors import AdapterError, LaunchError
from jaxserve.layers.args import DecoderArgs
from jaxserve.lora.delta import add_lora, merge, split
from jaxserve.lora.merge import merge_adapter
from jaxserve.lora.reader import AdapterReader
from jaxserve.models.registry import find_architecture
from jaxserve.parallel.parallelism import Parallelism
from tests.support.tiny import CONFIG, LINEAR_MODULES, write_adapter, write_checkpoint

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
EVERYTHING = (*LINEAR_MODULES, "embed_tokens", "lm_head")
SMALL: dict[str, Any] = {
    "max_total_tokens": 256,
    "page_size": 16,
    "max_running_requests": 2,
    "chunked_prefill_size": 16,  # few programs to compile
    "dtype": "float32",
}


def weights_of(folder: Path, **mesh: int) -> Any:
    config = EngineConfig(model_path=str(folder), **SMALL, **mesh)
    return build_runner(config, lambda items, *_: items).runner._weights


def delta_of(adapter: Path, *, replication: int = 1, **changes: Any) -> Any:
    """Read an adapter for the model of `tests.support.tiny`, whose KV heads may be replicated."""
    hf_config = CONFIG | changes
    architecture = find_architecture(hf_config)
    config = architecture.model_config(hf_config)
    parallelism = Parallelism(kv_head_replication=replication)
    decoder = architecture.build(DecoderArgs(config, jnp.dtype(jnp.float32), parallelism))
    return AdapterReader(decoder, architecture.tensor_names(config)).read(adapter)


def write_merged(folder: Path, adapter: Path, **changes: Any) -> Path:
    """Write the checkpoint of the base with an adapter merged by numpy."""
    write_checkpoint(folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    for module, found in read_peft(adapter).modules.items():
        delta = found.scale * found.b_OR.astype(np.float64) @ found.a_RI.astype(np.float64)
        tensors[f"{module}.weight"] = (tensors[f"{module}.weight"] + delta).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def close(got: Any, want: Any) -> None:
    for (path, left), right in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert left.sharding == right.sharding, path
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-5, err_msg=str(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_base_and_delta(family: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=EVERYTHING)
    base = write_checkpoint(tmp_path / "base", architectures=[family])
    want = weights_of(write_merged(tmp_path / "merged", adapter, architectures=[family]))
    close(merge_adapter(weights_of(base), delta_of(adapter, architectures=[family])), want)


@pytest.mark.parametrize("module", EVERYTHING)
def test_each_module_alone(module: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=[module], use_rslora=True)
    want = weights_of(write_merged(tmp_path / "merged", adapter))
    close(merge_adapter(weights_of(write_checkpoint(tmp_path / "base")), delta_of(adapter)), want)


def test_merged_in_shards_with_repeated_heads(tmp_path: Path) -> None:
    """Eight devices share four KV heads, so each head is replicated."""
    adapter = write_adapter(tmp_path / "adapter", modules=LINEAR_MODULES)
    want = weights_of(write_merged(tmp_path / "merged", adapter), tp_size=8)
    got = merge_adapter(weights_of(write_checkpoint(tmp_path / "base"), tp_size=8), delta_of(adapter, replication=2))
    close(got, want)


def test_a_merged_model_is_served(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=EVERYTHING)
    base = write_checkpoint(tmp_path / "base")
    merged = write_merged(tmp_path / "merged", adapter)
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    tokens = []
    for folder, options in ((base, {}), (base, {"merge_lora": str(adapter)}), (merged, {})):
        with LLM(str(folder), **SMALL, **options) as llm:
            tokens.append(llm.generate([[1, 2, 3]], sampling)[0].choices[0].token_ids)
    assert tokens[1] == tokens[2] != tokens[0]
    wrong = write_adapter(tmp_path / "wrong", CONFIG | {"hidden_size": 32})
    with pytest.raises(LaunchError, match="--merge-lora: the adapter does not fit the model: model"):
        LLM(str(base), **SMALL, merge_lora=str(wrong))


def test_a_merged_checkpoint_is_written(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=EVERYTHING)
    base = write_checkpoint(tmp_path / "base")
    convert(str(base), tmp_path / "converted", "auto", str(adapter))
    want = weights_of(write_merged(tmp_path / "merged", adapter))
    close(weights_of(tmp_path / "converted"), want)
    convert_adapter(adapter, tmp_path / "orbax")
    close(merge_adapter(weights_of(base), delta_of(tmp_path / "orbax")), want)


def test_split_takes_out_what_merge_has_put_in(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=EVERYTHING)
    base, delta = weights_of(write_checkpoint(tmp_path / "base")), delta_of(adapter)
    merged = merge(base, delta, add_lora)
    assert not np.allclose(merged["lm_head"]["weight"], base["lm_head"]["weight"], atol=0.1)
    again = split(merged, delta, add_lora)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=1e-5), again, base)


def test_layers_without_the_module_stay_as_they_are(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules=["layers.1.mlp.up_proj"])
    base, delta = weights_of(write_checkpoint(tmp_path / "base")), delta_of(adapter)
    merged = merge(base, delta, add_lora)
    up_proj, merged_up_proj = (tree["layers"]["mlp"]["up_proj"]["weight"] for tree in (base, merged))
    np.testing.assert_array_equal(merged_up_proj[0], up_proj[0])
    assert not np.allclose(merged_up_proj[1], up_proj[1])
    assert merged["embed"] is base["embed"] or merged["embed"]["weight"] is base["embed"]["weight"]


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_of_a_tied_pair_is_not_merged(module: str, tmp_path: Path) -> None:
    delta = delta_of(write_adapter(tmp_path / "adapter", modules=[module]), tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="can be served, not merged"):
        merge_adapter({"embed": {"weight": jnp.zeros((260, 64))}}, delta)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    other = CONFIG | {"num_hidden_layers": 3, "intermediate_size": 96}
    adapter = write_adapter(tmp_path / "adapter", other)
    with pytest.raises(AdapterError) as refused:
        delta_of(adapter)
    text = str(refused.value)
    assert "model.layers.0.mlp.up_proj: expects a weight of shape (96, 64), the model has (128, 64)" in text
    assert "model.layers.2.mlp.down_proj: not a module of the model that adapters can change" in text
