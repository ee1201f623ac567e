r"""Measure the quality loss of a quantised cache, of quantised weights and of quantised activations.

It compares the log-probabilities of a text's tokens with those of the same model without any of these. Accepts the
flags of the server; activations are quantised only in steps of more than 128 tokens.

    python scripts/bench/quality.py --model-path demo --kv-cache-dtype int8 --text README.md
    python scripts/bench/quality.py --model-path demo --quantization w8a8_fp8 \
        --max-running-requests 256 --text README.md
"""

import argparse
from pathlib import Path

import msgspec
import numpy as np

from jaxserve.arguments import parse_arguments
from jaxserve.config import EngineConfig
from jaxserve.engine.builder import build_runner
from jaxserve.loading.hub import find_model
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, ScheduledRow, SchedulerOutput
from jaxserve.text.tokenizer import load_tokenizer


def logprobs(config: EngineConfig, token_ids: list[int]) -> np.ndarray:
    """Return the log-probability of each token after the first, f32."""
    built = build_runner(config, lambda items, *_: items)
    built.runner.compile(lambda names: names)
    built.runner.warm_up()
    size, chunk = built.cache.page_size, built.scheduler.max_rows
    found: list[np.ndarray] = []
    for start in range(0, len(token_ids) - 1, chunk):
        tokens = token_ids[start : min(start + chunk, len(token_ids) - 1)]
        row = ScheduledRow(
            row=0,
            token_ids=tuple(tokens),
            num_computed_tokens=start,
            new_page_ids=tuple(range(-(-start // size), -(-(start + len(tokens)) // size))),
            samples=False,
            prompt_targets=tuple(token_ids[start + 1 : start + 1 + len(tokens)]),
        )
        new_rows = (NewRow(row=0, sampling=SamplingParams(), seed=0),) if start == 0 else ()
        plan = SchedulerOutput(step=0, new_rows=new_rows, rows=(row,))
        (out,) = built.runner.forward((plan,)).sample((None,)).result()
        assert out is not None
        found.append(out.prompt[0].logprobs_C)
    return np.concatenate(found)


def main() -> None:
    """Print both perplexities, and the differences of log-probabilities per token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    args, flags = parser.parse_known_args()
    config = parse_arguments(flags).engine
    if config.dp_size > 1:
        parser.error("--dp-size: one copy reads the text")
    path = find_model(config.model_path, config.revision, config.download_dir)
    config = msgspec.structs.replace(config, model_path=str(path))
    text = args.text.read_text()
    token_ids = load_tokenizer(path).encode(text, add_special_tokens=True, max_tokens=len(text))[: args.tokens]
    plain = logprobs(msgspec.structs.replace(config, kv_cache_dtype="auto", quantization=None), token_ids)
    quantized = logprobs(config, token_ids)
    apart = np.abs(plain - quantized)
    print(f"{len(plain)} tokens: perplexity {np.exp(-plain.mean()):.3f}, quantised {np.exp(-quantized.mean()):.3f}")
    print(f"absolute difference of log-probabilities: mean {apart.mean():.4f}, largest {apart.max():.3f}")


if __name__ == "__main__":
    main()
