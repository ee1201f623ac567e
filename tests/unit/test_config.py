"""Reading of models' `config.json`, of flags and of config files: accepted values, defaults and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.arguments import build_parser, parse_arguments
from jaxserve.config import LoraConfig
from jaxserve.errors import LaunchError
from jaxserve.models.registry import architecture_name, find_architecture
from tests.support.tiny import CONFIG


def read(**changes: Any) -> Any:
    config = {**CONFIG, **changes}
    return find_architecture(config).model_config(config)


def test_reads_a_plain_config() -> None:
    model = read()
    assert (model.num_q_heads, model.num_kv_heads, model.head_dim, model.eos_token_ids) == (8, 4, 8, (257,))
    assert model.rope.theta == 10000.0


def test_code_beside_the_weights_is_not_opened() -> None:
    """Model authors publish code next to the weights; the architecture is known without it."""
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    assert read(architectures=["Phi3ForCausalLM"], auto_map=code) == read(architectures=["Phi3ForCausalLM"])


def test_missing_config_keys_use_transformers_defaults() -> None:
    qwen = read(architectures=["Qwen2ForCausalLM"], sliding_window=64)
    assert qwen.windows == (None,)
    assert read(architectures=["Qwen3ForCausalLM"], sliding_window=64, use_sliding_window=True).windows == (None,)
    gemma = read(architectures=["Gemma3ForCausalLM"], num_hidden_layers=6, hidden_act=None)
    assert gemma.activation == "gelu_tanh"
    assert [(layer.window, layer.rope) for layer in gemma.layers] == [(4096, "local")] * 5 + [(None, "global")]
    whole = read(
        architectures=["Gemma3ForCausalLM"], sliding_window=None, layer_types=["full_attention", "sliding_attention"]
    )
    assert [(layer.window, layer.rope) for layer in whole.layers] == [(None, "global"), (None, "local")]


def test_architectures_differ_where_they_should() -> None:
    qwen2 = read(architectures=["Qwen2ForCausalLM"])
    assert (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, None)
    assert read(architectures=["Qwen3ForCausalLM"]).qk_norm == "head"
    assert read(architectures=["MistralForCausalLM"], sliding_window=64).windows == (64,)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed(kind: str, ignore: Any = ("lm_head",), **weights: Any) -> dict[str, Any]:
    """Return the compressed-tensors config of Kimi K2 Thinking with some settings changed."""
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": plain | weights}
    method = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}
    return {"quantization_config": method | {"ignore": list(ignore) if isinstance(ignore, tuple) else ignore}}


MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 64),
    ],
)
def test_sliding_window(changes: dict[str, Any], window: int | None) -> None:
    assert read(architectures=["Qwen2ForCausalLM"], **changes).windows == (window,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "someone/evil--modeling.Model"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"num_hidden_layers": "many"}, "many"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers must be 1 to 1024"),
        ({"num_key_value_heads": 3}, "8 query heads"),
        ({"layer_types": 5, "sliding_window": 8}, "int"),
        ({"rope_parameters": "much"}, "dictionary update"),
        ({"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 0}, "zero"),
        ({"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 2**40}, "must be 1 to 1024"),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_scaling": "much"}, "mapping"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 0}, "zero"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "1 no_rope_layers for 2 layers"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": "10"}, "must be a list of 0 and 1"),
        ({"architectures": ["SmolLM3ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}, "layer_types"),
        ({"architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"factor": 8.0}}, "full_attention"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -4}, "at least 1"),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "yarn", "long_factor": [1.0]}}, "longrope"),
        ({"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes.*supported: awq, compressed-tensors"),
        ({"quantization_config": {"quant_method": "awq", "group_size": -1}}, "group_size .* must be a positive"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "awq with bits 8"),
        ({"quantization_config": {"quant_method": "gptq", "desc_act": True}}, "desc_act True"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "exactly one entry in config_groups"),
        (compressed("pack-quantized", num_bits=8), "pack-quantized of 8-bit int is not supported; supported: pack"),
        (compressed("pack-quantized", symmetric=False), "symmetric False"),
        (compressed("pack-quantized", strategy="tensor"), "by tensor are not supported"),
        (compressed("pack-quantized", group_size=0), "group_size .* must be a positive number, got 0"),
        (compressed("pack-quantized", ignore="lm_head"), "ignore must be a list"),
        (compressed("pack-quantized", ignore=["re:(a"]), "missing \\)"),
        (
            compressed("pack-quantized", ignore=["model.layers.1"]),
            "layers.1.self_attn.q_proj is not quantised, but other modules",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        (
            {"quantization_config": FP8 | {"weight_block_size": [128, 0]}},
            "weight_block_size .* must be a positive number",
        ),
        ({"quantization_config": FP8 | {"weight_block_size": [2**70, 1]}}, "must be a positive number"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme 'static'"),
        ({"quantization_config": FP8 | {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}}, "up_proj is not"),
        ({"architectures": ["MixtralForCausalLM"]}, "num_local_experts is missing"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok must be 1 to 8 experts, got 9"),
        (MIXTRAL | {"num_local_experts": 0}, "num_experts of experts must be a positive"),
        (QWEN3_MOE | {"decoder_sparse_step": "two"}, "two"),
        (QWEN3_MOE | {"num_experts": 2**31 - 1}, "at most 4096 experts"),
        (DEEPSEEK | {"num_nextn_predict_layers": 10**12}, "num_nextn_predict_layers must be 0 to 16"),
        (QWEN3_MOE | {"moe_intermediate_size": 2**31}, "intermediate_size of experts"),
        (DEEPSEEK | {"n_group": 3}, "8 experts are not divisible into 3 groups"),
        (DEEPSEEK | {"n_group": 8}, "groups need at least 2 experts"),
        (DEEPSEEK | {"topk_group": 5}, "topk_group must be 1 to 4"),
        (DEEPSEEK | {"topk_group": 1}, "topk_group must be 1 to 4 and give 3 experts"),
        (DEEPSEEK | {"kv_lora_rank": -1}, "kv_lora_rank must be positive"),
        (DEEPSEEK | {"qk_rope_head_dim": 7}, "head_dim must be even"),
        (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        (DEEPSEEK | {"topk_method": "greedy"}, "topk_method 'greedy'"),
        (DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"architectures": ["GptOssForCausalLM"], "swiglu_limit": 0}, "swiglu_limit must be positive"),
        ({"sliding_window": 8, "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"sliding_window": 8, "layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refuses_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        read(**changes)


def test_parts_that_are_quantised() -> None:
    """In Kimi K2 Thinking only the experts are quantised, in DeepSeek everything."""
    deepseek = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "dtype": "bfloat16",
    }
    names = (r"re:.*self_attn.*", r"re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")
    kimi = read(**deepseek, **compressed("pack-quantized", ignore=("lm_head", *names)))
    assert kimi.quantization.parts == ("experts",)
    assert (kimi.quantization.block, kimi.quantization.scale_dtype) == ((1, 32), "bfloat16")
    assert len(read(**deepseek, quantization_config=FP8).quantization.parts) == 4
    # A name need only cover the layers that have the module; one that covers all modules means no quantisation.
    dense = read(**deepseek, quantization_config=FP8 | {"modules_to_not_convert": ["model.layers.0.mlp"]})
    assert dense.quantization.parts == ("attention", "shared_expert", "experts")
    assert read(quantization_config=FP8 | {"modules_to_not_convert": ["model"]}).quantization is None


def test_a_pattern_that_never_ends_is_given_up() -> None:
    with pytest.raises(LaunchError, match="timed out"):
        read(**compressed("pack-quantized", ignore=(r"re:(\w|[a-z]|\.)+[A-Z]",)))


def test_layers_with_experts() -> None:
    def kinds(**changes: Any) -> list[str]:
        return [layer.mlp for layer in read(**changes, num_hidden_layers=4).layers]

    assert kinds(**MIXTRAL) == ["experts"] * 4
    assert kinds(**QWEN3_MOE, mlp_only_layers=[1]) == ["experts", "dense", "experts", "experts"]
    assert kinds(**QWEN3_MOE, decoder_sparse_step=2) == ["dense", "experts"] * 2
    assert kinds(**DEEPSEEK, first_k_dense_replace=1) == ["dense", "experts", "experts", "experts"]


@pytest.mark.parametrize("names", [None, [], ["Nothing"], ["LlamaForCausalLM", "Other"], "LlamaForCausalLM", [5]])
def test_unknown_architectures_list_the_known(names: Any) -> None:
    with pytest.raises(LaunchError, match="supported: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, Gemma3ForC"):
        architecture_name({"architectures": names})


def test_config_file_gives_defaults_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model-path: demo\nport: 1234\ntp_size: 2\ndisable-radix-cache: true\nenable-metrics: false\n")
    config = parse_arguments(["--config", str(file), "--port", "5678"])
    assert (config.files.model_path, config.http.port, config.engine.tp_size) == ("demo", 5678, 2)
    assert not config.engine.prefix_caching
    assert not config.http.enable_metrics


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no-such: 1", "unknown flag 'no-such'"),
        ("port: high", "port has a bad value 'high'"),
        ("disable-radix-cache: 3", "must be true or false"),
        ("dtype: int3", "dtype must be one of"),
        ("- a list", "expected a mapping"),
        ("a: [", "config"),
    ],
)
def test_bad_config_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(LaunchError, match=message):
        parse_arguments(["--config", str(file)])


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    monkeypatch.setenv("JAXSERVE_ADMIN_API_KEY", "more secret")
    config = parse_arguments(["--model", "demo"])
    assert (config.http.api_key, config.http.admin_api_key) == ("secret", "more secret")
    assert "secret" not in str(config.flags)


@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key"])
def test_empty_api_key_is_refused(flag: str) -> None:
    with pytest.raises(LaunchError, match=f"{flag} must not be empty"):
        parse_arguments(["--model", "demo", flag, ""])


def test_lora_paths_flag_formats() -> None:
    as_json = '{"lora_name": "c", "lora_path": "org/c", "pinned": true}'
    lora = parse_arguments(["--model", "demo", "--lora-paths", "org/a", "b=./b", as_json]).engine.lora
    assert lora == LoraConfig(paths={"org/a": "org/a", "b": "./b", "c": "org/c"}, pinned=("c",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lora-paths a=x/y a=x/z", "two adapters are called 'a'"),
        ("--lora-paths a:b=x/y", "an adapter's name must be 1 to 256 printable characters without a colon"),
        ("--lora-paths =x/y", "an adapter's name must be"),
        ('--lora-paths {"lora_name":"a"}', "Object missing required field `lora_path`"),
        ("--enable-lora", "needs --max-lora-rank and --lora-target-modules"),
        ("--enable-lora --max-loras-per-batch 1", "--max-loras-per-batch must be at least 2"),
        ("--lora-paths a=x --max-lora-rank 0", "--max-lora-rank must be at least 1"),
        ("--lora-paths a=x --max-loaded-loras 7", "--max-loaded-loras must be at least 8"),
        ("--lora-paths a=x b=y c=z --max-loras-per-batch 2 --max-loaded-loras 2", "at least 3 .--lora-paths."),
        ('--lora-paths a=x {"lora_name":"b","lora_path":"y","pinned":true} --max-loras-per-batch 2', "leaves no slot"),
        ("--lora-root .", "--lora-root needs --enable-lora"),
        ("--max-lora-rank 4", "--max-lora-rank needs --enable-lora"),
        ("--lora-paths a=x --lora-root /nowhere", "--lora-root /nowhere: no such folder"),
    ],
)
def test_bad_adapter_flags(arguments: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        parse_arguments(["--model", "demo", *arguments.split()])


def test_help_gives_each_default() -> None:
    text = build_parser().format_help()
    assert "(default: 127.0.0.1)" in text
    assert "memory and batching:" in text


def test_config_file_negations_and_strings(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: demo\nno-enable-metrics: true\napi-key: 12345\n")
    http = parse_arguments(["--config", str(file)]).http
    assert not http.enable_metrics
    assert http.api_key == "12345"


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--tp", "8", "--dp", "2"], (8, 2, None, False)),
        # --tp counts all devices, and each device has its own experts.
        (["--tp", "8", "--dp", "4", "--enable-dp-attention"], (2, 4, 2, True)),
        (["--tp", "8", "--dp", "4", "--enable-dp-attention", "--ep", "4"], (2, 4, 1, True)),
    ],
)
def test_devices(flags: list[str], sizes: tuple[int, int, int | None, bool]) -> None:
    engine = parse_arguments(["--model", "demo", *flags]).engine
    assert (engine.tp_size, engine.dp_size, engine.ep_size, engine.dp_attention) == sizes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tp", "8", "--enable-dp-attention"], "needs --dp-size above 1"),
        (["--tp", "8", "--dp", "3", "--enable-dp-attention"], "--dp-size 3 does not divide --tp-size 8"),
        (["--tp", "8", "--dp", "4", "--ep", "2", "--enable-dp-attention"], "--dp-size 4 does not divide --ep-size 2"),
        (["--dp", "0", "--enable-dp-attention"], "--dp-size must be at least 1"),
    ],
)
def test_incompatible_parallel_sizes_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        parse_arguments(["--model", "demo", *flags])


def test_deepseek_v2_chooses_experts_among_all_or_in_groups() -> None:
    folder = Path(__file__).parent.parent / "golden" / "deepseek_v2"
    config = json.loads((folder / "config.json").read_text())
    read = find_architecture(config).model_config
    grouped = read(config).moe
    assert grouped is not None
    assert (grouped.num_groups, grouped.top_groups, grouped.group_scores, grouped.scale) == (4, 2, 1, 4.0)
    lite = read(config | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}).moe
    assert lite is not None
    assert (lite.num_groups, lite.normalize, lite.scores) == (1, False, "softmax")
    with pytest.raises(LaunchError, match="topk_method 'noaux_tc' is not supported; supported: greedy, group_lim"):
        read(config | {"topk_method": "noaux_tc"})
    with pytest.raises(LaunchError, match="norm_topk_prob is not supported"):
        read(config | {"norm_topk_prob": True})
