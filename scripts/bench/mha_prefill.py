"""Measure the gain of MHA prefill for MLA models: a step in absorbed form and as MHA, in turn.

Accepts the flags of the server. Needs only the model's `config.json`: weights are zeros, which takes as long.

    python scripts/bench/mha_prefill.py --model-path ./deepseek-v2-lite --rounds 10
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxserve.arguments import parse_arguments
from jaxserve.layout.expert_groups import choose_ep_size
from jaxserve.layout.layout import layout_engine, layout_model
from jaxserve.loading.hub import find_config
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.batch import ForwardBatch, RowTable
from jaxserve.runner.buckets import ForwardShape
from jaxserve.runner.programs import StepModel, StepPrograms
from jaxserve.runner.transfer import to_devices, zeros
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, ScheduledRow, SchedulerOutput

_POOL_BYTES = 4 << 30


def make_batch(model: StepModel, num_tokens: int, length: int) -> ForwardBatch:
    """Build a batch of the last `num_tokens` tokens of a prompt of `length` tokens."""
    rows = RowTable(model.layout)
    new = NewRow(row=0, sampling=SamplingParams(), seed=0)
    rows.admit(new)
    pages = tuple(range(-(-length // model.layout.page_size)))
    prompt = ScheduledRow(
        row=0,
        token_ids=(0,) * num_tokens,
        num_computed_tokens=length - num_tokens,
        new_page_ids=pages,
        samples=False,
    )
    batch = rows.build(SchedulerOutput(step=0, new_rows=(new,), rows=(prompt,)), model.buckets[0])
    return jax.tree.map(lambda array: array[None], batch)


def main() -> None:
    """Print a line for each prompt length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    args, flags = parser.parse_known_args()
    config = parse_arguments(flags).engine
    hf_config = find_config(config.model_path, config.revision, config.download_dir)
    ep_size = choose_ep_size(config, hf_config, jax.default_backend())
    layout = layout_model(config, hf_config, make_mesh(config.tp_size, 1, ep_size))
    model = layout_engine(config, layout, _POOL_BYTES).step
    workspace = model.mla_workspace
    if workspace is None:
        parser.error("--model-path: this model has no MHA prefill")
    programs = StepPrograms(model)
    shapes = [ForwardShape(model.buckets[0], mha_prefill=mha) for mha in (False, True)]
    forwards = [programs.lower_forward(shape).compile() for shape in shapes]
    weights, cache = zeros(programs.weight_shapes()), zeros(programs.cache_shapes())
    last_token_R = zeros(programs.state_shapes().last_token_R)

    def seconds(forward: Callable[..., tuple[dict[str, jax.Array], jax.Array]], batch: ForwardBatch) -> float:
        nonlocal cache
        start = time.perf_counter()
        cache, logits = forward(weights, {}, cache, last_token_R, batch)
        jax.block_until_ready(logits)
        return time.perf_counter() - start

    num_tokens = length = min(model.buckets[0].num_tokens, workspace.num_tokens)
    while length <= workspace.num_tokens:
        batch = to_devices(make_batch(model, num_tokens, length), programs.by_replica)
        rounds = np.array([[seconds(forward, batch) for forward in forwards] for _ in range(args.rounds + 1)])[1:]
        cached, expanded = np.median(rounds, axis=0) * 1e3
        ratio = statistics.median(rounds[:, 1] / rounds[:, 0])
        costs = workspace.costs([(num_tokens, length)])
        print(
            f"{num_tokens} tokens after {length - num_tokens}: absorbed {cached:.0f} ms, MHA {expanded:.0f} "
            f"ms, {ratio:.2f} of it; taken: {costs.mha < costs.absorbed}"
        )
        length *= 2


if __name__ == "__main__":
    main()
